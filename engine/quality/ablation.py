"""Which neurons may be left out, and how exactly the rest is needed: rules compared on an uncompressed checkpoint.

A `Setting` says by what score neurons are kept, how many, and at which values of the weights; `Comparison.loss` runs a
text through the model under it, many tokens at once. Nothing is cached or counted: this is the experiment behind the
format and the levels (sketch to choose, refine what was chosen), repeatable on every model by `tables`.
Legend: T tokens, k routed experts, I neurons, H hidden, E experts, L layers. All in float32 and in memory.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from engine.core import UserError
from engine.experts.hook import Hook
from engine.experts.layer import LayerExperts
from engine.files.quantize import CLIPS, TINY, nested
from engine.model.load import Loaded
from engine.quality.loss_probe import log_probabilities, loss_of
from kernels.layout import Layout

Tensor = torch.Tensor
SCORES = ("none", "up", "product", "sketch")
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Setting:
    """One rule. Shares are of the routed neurons of a token.

    score: none (all are kept), up (FloE's |u|), product (|act(g)*u|, the oracle), sketch (the same of the 2-bit view).
    joint: one budget over the routed experts by router weight times score, else the same share of each expert.
    values: name of the weights that compute the kept neurons; the next `down_only` share takes gate and up from the
    2-bit view.
    """

    score: str = "none"
    refined: float = 1.0
    down_only: float = 0.0
    joint: bool = True
    values: str = "full"

    def __post_init__(self) -> None:
        assert self.score in SCORES and 0 < self.refined and self.refined + self.down_only <= 1, self


# --- values of the weights ------------------------------------------------------------------------------------------
Weights = list[tuple[Tensor, Tensor, Tensor]]  # per layer: gate, up, down [E, I, H]


def plain(weight: Tensor, group: int, bits: int) -> Tensor:
    """[.., H] -> its values after plain quantisation: clip search, least-squares scale and offset of each group."""
    w, top = weight.unflatten(-1, (-1, group)), 2 ** bits - 1
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    best = best_error = None
    for clip in CLIPS:
        step = ((high - low) * clip / top).clamp_min(TINY)
        codes = ((w - (low + high) / 2) / step + top / 2).round().clamp(0, top)
        centred = codes - codes.mean(-1, keepdim=True)
        scale = (centred * w).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp_min(TINY)
        values = (w.mean(-1, keepdim=True) + scale.half().float() * centred)
        error = (values - w).square().sum(-1, keepdim=True)
        if best is None:
            best, best_error = values, error
        else:
            best, best_error = torch.where(error < best_error, values, best), error.minimum(best_error)
    return best.flatten(-2)


def both_views(weight: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """[I, H] -> values of the nested codes: the 2-bit view, the 4-bit view."""
    found = nested(weight, layout)
    def values(codes: Tensor, scales: Tensor) -> Tensor:
        grouped = codes.unflatten(1, (layout.groups, layout.group)).float()
        return torch.addcmul(scales[..., 1:].float(), grouped, scales[..., :1].float()).flatten(1)[:, :layout.hidden]
    return values(found.codes >> 2, found.coarse), values(found.codes, found.fine)


def full_weights(loaded: Loaded) -> Weights:
    """Every expert as far memory has it. UserError when the experiment would not fit into memory."""
    far = loaded.runtime.far
    shape = (far.experts, far.neurons, far.hidden)
    n_bytes = 3 * far.layers * far.experts * far.neurons * far.hidden * 4
    if 4 * n_bytes > psutil.virtual_memory().available:
        raise UserError(f"The tables hold all experts four times in memory, {4 * n_bytes / 1e9:.1f} GB, more than is "
                        "free; choose a smaller model.")
    found = [tuple(torch.empty(shape) for _ in range(3)) for _ in range(far.layers)]
    for i, layer in enumerate(found):
        for e in range(far.experts):
            far.decode(i, e, *(matrix[e] for matrix in layer))
    return found


def _each(weights: Weights, change: Callable[[Tensor], Tensor]) -> Weights:
    """A new value for every matrix [I, H] of every expert."""
    return [tuple(torch.stack([change(expert) for expert in matrix]) for matrix in layer) for layer in weights]


# --- the experiment -------------------------------------------------------------------------------------------------
class Comparison(Hook):
    """An open checkpoint whose experts compute under `setting`. group: of the quantised views.

    `weights` holds values by name: full, nested (4-bit view), sketch (2-bit view of gate and up, 4-bit down).
    """

    def __init__(self, loaded: Loaded, group: int) -> None:
        self.loaded, self.group, self.setting = loaded, group, Setting()
        far = loaded.runtime.far
        layout = Layout(far.hidden, far.neurons, group)
        full = full_weights(loaded)
        views = [[[both_views(e, layout) for e in matrix] for matrix in layer] for layer in full]
        self.weights: dict[str, Weights] = {
            "full": full,
            "nested": [tuple(torch.stack([v[1] for v in m]) for m in layer) for layer in views],
            "sketch": [tuple(torch.stack([v[int(j == 2)] for v in m]) for j, m in enumerate(layer)) for layer in views]}

    def add_plain(self, bits: int) -> str:
        """Make plain values of so many bits; the name of them."""
        name = f"plain {bits}-bit"
        self.weights[name] = _each(self.weights["full"], lambda w: plain(w, self.group, bits))
        return name

    @torch.inference_mode()
    def loss(self, rows: Tensor, setting: Setting) -> float:
        """Mean next-token loss in nats of rows int64 [R, T], each read on its own."""
        self.setting, total = setting, 0.0
        with self.loaded.runtime.hooked(self):
            for batch in rows.split(max(1, TOKENS_AT_ONCE // rows.shape[1])):
                total += loss_of(log_probabilities(self.loaded.model, batch), batch[:, 1:].flatten())
        return total / rows[:, 1:].numel()

    def instead(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        setting, x, weights = self.setting, x.float(), weights.float()
        seen_by = "sketch" if setting.score == "sketch" else "full"
        names = {"values": setting.values, "coarse": "sketch", "score": seen_by}
        made = {name: torch.zeros(*ids.shape, self.loaded.runtime.far.neurons) for name in names}
        downs = {e: self.weights[setting.values][layer.index][2][e] for e in ids.unique().tolist()}
        for e in downs:
            token, place = (ids == e).nonzero(as_tuple=True)
            for name, source in names.items():
                if not self._unused(setting, name):
                    made[name][token, place] = self._product(layer, e, x[token], source, setting.score == "up"
                                                             and name == "score")
        best, rest = chosen(made["score"].abs(), weights, setting)
        product = torch.where(best, made["values"], torch.where(rest, made["coarse"], 0.0))
        return layer.combined(product, downs, ids, weights)

    @staticmethod
    def _unused(setting: Setting, name: str) -> bool:
        return (name == "coarse" and not setting.down_only) or (name == "score" and setting.score == "none")

    def _product(self, layer: LayerExperts, e: int, x: Tensor, source: str, up_only: bool) -> Tensor:
        """act(g)*u of one expert, or u alone: x [n, H] -> [n, I]."""
        gate, up, _ = self.weights[source][layer.index]
        bias = (layer.biases["gate_bias"][e], layer.biases["up_bias"][e]) if layer.biases else (0.0, 0.0)
        u = x @ up[e].T + bias[1]
        return u if up_only else layer.gate(x @ gate[e].T + bias[0], u)


def chosen(scores: Tensor, weights: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Masks [T, k, I] of the refined and of the down-only neurons; scores [T, k, I] >= 0, weights [T, k]."""
    if setting.score == "none":
        return torch.ones_like(scores, dtype=torch.bool), torch.zeros_like(scores, dtype=torch.bool)
    ranked = (scores * weights.abs()[..., None]).flatten(1) if setting.joint else scores.flatten(0, 1)
    n = ranked.shape[1]
    n_refined, n_all = round(n * setting.refined), round(n * (setting.refined + setting.down_only))
    order = ranked.topk(n_all, dim=1).indices
    best, rest = (torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, part, True)
                  for part in (order[:, :n_refined], order[:, n_refined:]))
    return best.view(scores.shape), rest.view(scores.shape)
