"""One layer's experts as a runtime computes them, what a calibrated level keeps of each layer, and which are busy.

Legend: T tokens, k routed experts, E experts, I neurons, H hidden, L layers.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from kernels.activation import KINDS, Gate, NeuronBias
from kernels.weigh import Mixture

Tensor = torch.Tensor
Rows = tuple[Tensor, Tensor]  # gate_up [2I, H] in the module's own order, down [I, H]
ACTIVITY_DECAY = 0.97  # what is left of an expert's activity after a token: about the last 30 tokens are seen


@dataclass(frozen=True)
class LevelPlan:
    """What calibration found for a sparse level: per layer (refined, down-only) neurons, or FloE's thresholds.

    budgets: L pairs; thresholds: L rows of E numbers, only for level `floe`.
    """

    budgets: tuple[tuple[int, int], ...] = ()
    thresholds: tuple[tuple[float, ...], ...] = ()


@dataclass
class LayerExperts:
    """What one experts module needs to compute, on its runtime's device; lives as long as the open model.

    join: gate, up [.., I] -> gate_up in the module's own order; apply_gate: gate_up -> product [.., I]. is_shortcut:
    chosen early in a block and added at its end; a pick of an identity has weight 0, and nothing of it is fetched.
    """

    index: int
    interleaved: bool
    apply_gate: Callable[[Tensor], Tensor]
    biases: dict[str, Tensor]  # float32 gate_bias, up_bias [E, I], down_bias [E, H], or nothing
    post_norm: Callable[[Tensor], Tensor] | None = None
    router_weight: Tensor | None = None  # float32 [E, H], for prediction
    is_shortcut: bool = False
    gate: Gate = field(init=False)  # one that the kernels know, else the module's own function

    def __post_init__(self) -> None:
        # No method of this object: it would live on until the next collection, and its router with it on a card.
        own = Gate("other", function=partial(_gated, self.apply_gate, self.interleaved))
        self.gate = recognised(self.apply_gate, self.join) or own
        if self.biases:
            self.gate_up_bias = self.join(self.biases["gate_bias"], self.biases["up_bias"])

    @property
    def can_be_guessed(self) -> bool:
        """Whether the layer before has to guess what this one will want: a shortcut's own router speaks early."""
        return self.router_weight is not None and not self.is_shortcut

    def __deepcopy__(self, memo: dict) -> LayerExperts:
        return self  # nothing of it ever changes

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        return _joined(gate, up, self.interleaved)

    def halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the rows of gate and of up in [2I, H]."""
        half = gate_up.shape[0] // 2
        return (gate_up[::2], gate_up[1::2]) if self.interleaved else (gate_up[:half], gate_up[half:])

    def neuron_bias(self, ids: Tensor) -> NeuronBias | None:
        """Of gate and up of experts `ids`; of none that a shortcut's -1 says, any."""
        if not self.biases:
            return None
        known = ids.clamp(min=0) if self.is_shortcut else ids
        return NeuronBias(self.biases["gate_bias"], self.biases["up_bias"], known)

    def whole(self, x: Tensor, gate_up: Tensor, down: Tensor, expert: int) -> Tensor:
        """One whole expert: x [n, H] -> [n, H], before the router's weight."""
        joined = F.linear(x, gate_up, self.gate_up_bias[expert] if self.biases else None)
        return self.finish(self.apply_gate(joined) @ down, expert)

    def finish(self, y: Tensor, expert: int | Tensor) -> Tensor:
        """Bias of down and the norm after each expert, where the model has them; y [.., H]."""
        if self.biases:
            y = y + self.biases["down_bias"][expert]
        return y if self.post_norm is None else self.post_norm(y)

    def mixed(self, product: Callable[..., Tensor], ids: Tensor, weights: Tensor, residual: Tensor | None, hidden: int,
              leaves_out: bool) -> Tensor:
        """product: `dense` or `apply`, but for their mixture; weights [T, k] -> [T, hidden], which the kernel makes
        where nothing stands between."""
        if self.post_norm is None and not leaves_out:
            bias = (self.biases["down_bias"], ids) if self.biases else ()
            return product(mixture=Mixture(weights, hidden, residual, *bias))
        y = self.finish(product()[..., :hidden], ids.long()) * weights[..., None]
        # Where nothing was near and nothing may be fetched, what was multiplied is no expert at all.
        out = (torch.where(weights[..., None] == 0, 0.0, y) if leaves_out else y).sum(1)
        return out if residual is None else residual + out

    def combined(self, product: Tensor, downs: dict[int, Tensor], ids: Tensor, weights: Tensor) -> Tensor:
        """Products act(g)*u [T, k, I] and down rows [I, H] of every expert in ids [T, k] -> float32 [T, H]."""
        out = torch.zeros(len(ids), next(iter(downs.values())).shape[1], dtype=torch.float32,
                          device=product.device)
        for expert, down in downs.items():
            token, place = (ids == expert).nonzero(as_tuple=True)
            y = self.finish(product[token, place] @ down, expert)
            out.index_add_(0, token, y * weights[token, place, None])
        return out


class Activity:
    """Which experts are busy: a few operations a token, at its last layer, instead of a few a layer."""

    def __init__(self, layers: int, experts: int, device: str, has_gaps: bool = False) -> None:
        """has_gaps: an id may be -1, for none."""
        self.layers, self.experts, self.has_gaps = layers, experts, has_gaps
        # Picks of each expert, decaying and all since the model was opened; last, their tokens.
        self.picks = torch.zeros(2, layers * experts + 1, dtype=torch.float32, device=device)
        self._kept = torch.tensor([[ACTIVITY_DECAY], [1.0]], device=device)
        self._first = experts * torch.arange(layers, device=device)[:, None]
        self._picked: dict[int, Tensor] = {}  # of this step, by layer

    def step_begins(self) -> None:
        self._picked = {}

    def picked(self, layer: int, ids: Tensor) -> None:
        self._picked[layer] = ids.flatten()
        if layer + 1 == self.layers == len(self._picked):
            self.count(torch.stack(list(self._picked.values())))

    def count(self, ids: Tensor) -> None:
        """ids [L, n], the routed experts of a step."""
        picked = ((ids.clamp(min=0) if self.has_gaps else ids).long() + self._first).flatten()
        picked = torch.cat((picked, self._first[-1] + self.experts))  # and one token more
        ones = torch.ones_like(picked, dtype=torch.float32)
        if self.has_gaps:
            ones[:-1] = ids.flatten() >= 0
        self.picks.mul_(self._kept).index_add_(1, picked, ones.expand(2, -1))

    def count_here(self, ids: Tensor) -> None:
        """The same on a processor, of one token, in a tenth of the time."""
        picks, first = self.picks.numpy(), self._first.numpy()
        picks *= self._kept.numpy()
        picks[:, (first + ids.numpy()).ravel()] += 1
        picks[:, -1] += 1

    def shares(self) -> list[list[float]]:
        picks = self.picks[0].cpu()
        return (picks[:-1] / picks[-1].clamp_min(1)).view(self.layers, -1).numpy().round(3).tolist()


def _joined(gate: Tensor, up: Tensor, interleaved: bool) -> Tensor:
    return torch.stack((gate, up), -1).flatten(-2) if interleaved else torch.cat((gate, up), -1)


def _gated(apply_gate: Callable[[Tensor], Tensor], interleaved: bool, gate: Tensor, up: Tensor) -> Tensor:
    return apply_gate(_joined(gate, up, interleaved))


def recognised(apply_gate: Callable[[Tensor], Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Gate | None:
    """The gate of the kernels that a model's experts use, told from its values; None: they do not know it.

    apply_gate: gate_up [.., 2I] -> [.., I]; join: gate, up -> gate_up. Architectures differ in name, order of columns,
    clamps and constants, but a gate is a function of two numbers: on a grid of both, one kind fits or none does.
    """
    line = torch.linspace(-12, 12, 49)
    gate, up = (side.flatten()[None] for side in torch.meshgrid(line, line, indexing="ij"))
    wanted = apply_gate(join(gate, up))
    module = getattr(apply_gate, "__self__", None)  # a bound method: its constants are the module's
    numbers = {name: float(getattr(module, name)) for name in ("alpha", "limit") if hasattr(module, name)}
    for kind in KINDS:
        candidate = Gate(kind, **numbers)
        if torch.allclose(candidate(gate, up), wanted, rtol=1e-5, atol=1e-5):
            return candidate
    return None
