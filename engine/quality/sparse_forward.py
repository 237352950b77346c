"""Many tokens at once, each choosing its neurons as decode would: how calibration sees a sparse level.

While a `Simulation` is the runtime's hook, the experts modules of a model compute every routed neuron at both
fidelities, choose by the same scores and the same selection as engine/experts/runtime.py does step by step, and drop or
coarsen what decode would. No cache is involved. What is seen on the way (energies by rank, picks, |u|) goes to one
observer. Legend: T tokens, k routed experts, I neurons, N = k*I, H hidden, L layers, E experts.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.experts.hook import Hook
from engine.experts.layer import LayerExperts, LevelPlan
from engine.experts.runtime import Runtime
from kernels.activation import quantize_activation, widened
from kernels.planes import decode_down, decode_gate, decode_sketch, decode_up
from kernels.select import DOWN_ONLY, REFINED, select

Tensor = torch.Tensor


@dataclass
class LayerTrace:
    """What one MoE layer computed for T tokens. Products are before the router's weight.

    ids, weights [T, k]; scores [T, N]; up [T, k, I] the sketch's |u|; refined, coarse [T, k, I] products at both
    fidelities; downs: down rows [I, H] of every expert in ids; fidelity int8 [T, N], -1 for a neuron left out.
    """

    layer: int
    ids: Tensor
    weights: Tensor
    scores: Tensor
    up: Tensor
    refined: Tensor
    coarse: Tensor
    downs: dict[int, Tensor]
    fidelity: Tensor


class DecodedExperts:
    """Experts decoded once for many passes: gate, up at 4 bits, gate, up of the sketch, down; all float32 [I, padded].

    Keeps as many as fit a gibibyte, the first ones; calibration walks over all of them again and again.
    """

    LIMIT = 1 << 30  # bytes

    def __init__(self, runtime: Runtime, check: Callable[[], None] = lambda: None) -> None:
        """check: is called before an expert is computed with, and may raise."""
        self.far, self.device, self.check = runtime.far, runtime.device, check
        self._kept: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._room = self.LIMIT // (5 * 4 * self.far.neurons * self.far.layout.padded)

    def __call__(self, layer: int, expert: int) -> tuple[Tensor, ...]:
        self.check()
        if (layer, expert) in self._kept:
            return self._kept[layer, expert]
        far, layout = self.far, self.far.layout
        far.verify(layer, expert)
        rows = far.sketches(layer)[expert, 0, :far.neurons * layout.sketch_row]
        sketch, records = rows.view(far.neurons, -1).to(self.device), far.records(layer)[expert].to(self.device)
        found = (decode_gate(sketch, records, layout), decode_up(sketch, records, layout),
                 *decode_sketch(sketch, layout), decode_down(records, layout))
        if len(self._kept) < self._room:
            self._kept[layer, expert] = found
        return found


class Simulation(Hook):
    """`with runtime.hooked(Simulation(decoded, plan)): model(...)`. plan None: all refined, as level `exact`."""

    def __init__(self, decoded: DecodedExperts, plan: LevelPlan | None = None,
                 observe: Callable[[LayerTrace], None] | None = None) -> None:
        self.far, self.decoded, self.plan, self.observe = decoded.far, decoded, plan, observe

    def instead(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        trace = self._compute(layer, x.float(), ids, weights.float())
        if self.observe is not None:
            self.observe(trace)
        return self._sum(layer, trace)

    def _compute(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> LayerTrace:
        far, layout = self.far, self.far.layout
        padded = widened(x, layout.padded)
        codes, scales = quantize_activation(padded, layout.group)
        rough = (codes.unflatten(1, (layout.groups, -1)).float() * scales[..., None]).flatten(1)
        shape = (*ids.shape, far.neurons)
        names = ("score", "up", "refined", "coarse", "floe")
        out = {name: torch.zeros(shape, device=x.device) for name in names}
        downs = {}
        for e in ids.unique().tolist():
            at = (ids == e).nonzero(as_tuple=True)
            downs[e] = self._expert(layer, e, padded[at[0]], rough[at[0]], at, out)
        scores = (out["score"].abs() * weights.abs()[..., None]).flatten(1)
        refined = out["floe"] if self.plan is not None and self.plan.thresholds else out["refined"]
        return LayerTrace(layer.index, ids, weights, scores, out["up"].abs(), refined, out["coarse"], downs,
                          self._fidelity(layer.index, ids, scores, out["up"].abs()))

    def _expert(self, layer: LayerExperts, e: int, x: Tensor, rough: Tensor, at: tuple, out: dict) -> Tensor:
        gate4, up4, gate2, up2, down = self.decoded(layer.index, e)
        bias = (layer.biases["gate_bias"][e], layer.biases["up_bias"][e]) if layer.biases else (0.0, 0.0)
        g4, g2, u2 = x @ gate4.T + bias[0], x @ gate2.T + bias[0], x @ up2.T + bias[1]
        rough_up = rough @ up2.T + bias[1]
        out["up"][at] = rough_up
        out["score"][at] = layer.gate(rough @ gate2.T + bias[0], rough_up)
        out["refined"][at] = layer.gate(g4, x @ up4.T + bias[1])
        out["coarse"][at] = layer.gate(g2, u2)
        out["floe"][at] = layer.gate(g4, u2)
        return down[:, :self.far.hidden]

    def _fidelity(self, index: int, ids: Tensor, scores: Tensor, up: Tensor) -> Tensor:
        if self.plan is None:
            return torch.full_like(scores, REFINED, dtype=torch.int8)
        if self.plan.thresholds:
            limits = torch.tensor(self.plan.thresholds[index], device=ids.device)[ids]
            return torch.where(up > limits[..., None], REFINED, -1).flatten(1).to(torch.int8)
        refined, down_only = self.plan.budgets[index]
        neurons, fidelity = select(scores, refined, refined + down_only)
        return torch.full_like(scores, -1, dtype=torch.int8).scatter_(1, neurons.long(), fidelity)

    @staticmethod
    def _sum(layer: LayerExperts, trace: LayerTrace) -> Tensor:
        fidelity = trace.fidelity.view(trace.refined.shape)
        product = torch.where(fidelity == REFINED, trace.refined, 0.0)
        product = torch.where(fidelity == DOWN_ONLY, trace.coarse, product)
        return layer.combined(product, trace.downs, trace.ids, trace.weights)
