"""Step 2: every kernel of a product against its reference, at the shapes of real models, and how long compiling took.

Values may differ by a thousandth of the largest one (16 bits: a hundredth); what chooses neurons and `whole_sums` must
be the same to the bit. Each check has fresh inputs from its own seed, and one that breaks is a row, not the end.
"""
from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from engine.bench.blobs import random_blobs, random_matrix
from engine.bench.first_light.findings import Finding
from engine.bench.rows import Row
from kernels.activation import FixedPoint, Gate, NeuronBias, quantize, quantize_activation
from kernels.apply import apply, chosen_sums
from kernels.dense import dense, dequantize, multiply_tile, whole_sums
from kernels.layout import Layout, default_group_size
from kernels.score import score, score_up
from kernels.select import BINS, DOWN_ONLY, REFINED, histogram_of, select, select_above
from kernels.trunk.attend import Heads, attend
from kernels.trunk.choose import Entrance, Reader, choose
from kernels.trunk.delta import Mixer, delta
from kernels.trunk.gated import gated_linears
from kernels.trunk.head import best_rows, split
from kernels.trunk.latent import Latent, attend_latent
from kernels.trunk.linear import Matrices, dequantize_rows, linear, linears
from kernels.trunk.route import Choice
from kernels.trunk.settle import Settling, settle, settled_linears
from kernels.weigh import Mixture

Tensor = torch.Tensor
VALUES, SIXTEEN_BITS = 1e-3, 1e-2   # of the largest value; SIXTEEN_BITS where the result itself is rounded to 16 bits
TOTAL, REFINED_SHARE = 0.3, 0.15    # of the neurons


@dataclass(frozen=True)
class KernelShape:
    """A layer's experts, as of the model that is named."""

    model: str
    hidden: int
    neurons: int
    top_k: int
    kind: str = "silu"
    biased: bool = False

    @property
    def layout(self) -> Layout:
        return Layout(self.hidden, self.neurons, default_group_size(self.hidden))


SHAPES = (
    KernelShape("Qwen3.6", 2048, 512, 8), KernelShape("Qwen3-Next", 2048, 512, 10),
    KernelShape("Gemma 4", 2816, 704, 8, "gelu_tanh"), KernelShape("gpt-oss", 2880, 2880, 4, "clamped_swiglu", True),
    KernelShape("Mixtral", 4096, 14336, 2), KernelShape("hidden 5120", 5120, 1536, 6))


@dataclass
class Case:
    """One shape, T tokens, inputs on the device; on_cpu gives the same to a reference."""

    shape: KernelShape
    n_tokens: int
    device: str
    seconds: float = field(default=0.0, init=False)     # of the calls of kernels, compiling included

    def __post_init__(self) -> None:
        shape, draw = self.shape, torch.Generator().manual_seed(self.n_tokens)
        layout, n_experts, k = shape.layout, shape.top_k + 1, shape.top_k
        self.layout, self.gate = layout, Gate(shape.kind)
        x = torch.randn(self.n_tokens, layout.hidden, generator=draw)
        place = torch.stack([torch.randperm(n_experts, generator=draw)[:k] for _ in range(self.n_tokens)]).int()
        made = x, place, random_blobs(layout, n_experts), torch.rand(place.shape, generator=draw)
        self.x, self.place, self.blobs, self.weight = _there(made, self.device)
        self.bias = _there(_bias(place.shape, shape, draw), self.device)
        self.n_total, self.n_refined = (int(share * k * shape.neurons) for share in (TOTAL, REFINED_SHARE))

    def call(self, function: Callable, *given):
        """The device's version of a kernel; the time that it takes is counted."""
        start = time.perf_counter()
        found = function.on_gpu()(*given)
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return found

    def scored(self) -> tuple[tuple, Tensor, Tensor]:
        """What `score` is given, its scores, and the histogram that it counted."""
        codes, scales = quantize_activation.reference(self.x.cpu(), self.layout.group, self.layout.padded)
        histogram = torch.zeros(self.n_tokens, BINS, dtype=torch.int32, device=self.device)
        given = (codes.to(self.device), scales.to(self.device), self.blobs, self.place, self.weight, self.layout,
                 self.gate, self.bias)
        return given, self.call(score, *given, histogram), histogram

    def chosen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Neurons, fidelity and places of records for `apply`: any are as good as the best."""
        draw, shape = torch.Generator().manual_seed(9), self.shape
        neurons = torch.stack([torch.randperm(shape.top_k * shape.neurons, generator=draw)[:self.n_total].sort().values
                               for _ in range(self.n_tokens)])
        fidelity = torch.where(torch.rand(neurons.shape, generator=draw) < 0.5, REFINED, DOWN_ONLY).to(torch.int8)
        where = self.place.cpu().long().gather(1, neurons // shape.neurons) * shape.neurons + neurons % shape.neurons
        return neurons.int().to(self.device), fidelity.to(self.device), where.int().to(self.device)


def _bias(picks: tuple[int, ...], shape: KernelShape, draw: torch.Generator) -> NeuronBias | None:
    """Of picks out of nine experts, where the model has them."""
    tables = 0.1 * torch.randn(2, 9, shape.neurons, generator=draw)
    return NeuronBias(*tables, torch.randint(9, picks, generator=draw)) if shape.biased else None


def on_cpu(given: tuple) -> tuple:
    return _there(given, "cpu")


# --- a function each -> (found, expected, share of the largest value that they may differ by; 0: the same bits) -------
Compared = tuple[tuple[Tensor, ...], tuple[Tensor, ...], float]


def _quantize(case: Case) -> Compared:
    given = (case.x, case.layout.group, case.layout.padded)
    return case.call(quantize_activation, *given), quantize_activation.reference(*on_cpu(given)), 0.0


def _quantize_both(case: Case) -> Compared:
    given = (case.x, case.layout.group, case.layout.padded)
    return case.call(quantize, *given), quantize.reference(*on_cpu(given)), 0.0


def _score(case: Case) -> Compared:
    given, found, _ = case.scored()
    return (found,), (score.reference(*on_cpu(given)),), VALUES


def _histogram(case: Case) -> Compared:
    _, found, histogram = case.scored()
    return (histogram,), (histogram_of(found.cpu()),), 0.0


def _score_up(case: Case) -> Compared:
    given = (*case.scored()[0][:4], case.layout, case.bias)
    return (case.call(score_up, *given),), (score_up.reference(*on_cpu(given)),), VALUES


def _select(case: Case) -> Compared:
    """Of the device's own scores; the histogram is empty again afterwards."""
    _, scores, histogram = case.scored()
    refined, total = (torch.tensor([n], dtype=torch.int32, device=case.device) for n in (case.n_refined, case.n_total))
    found = case.call(select, scores, refined, total, case.n_total, histogram)
    expected = select.reference(scores.cpu(), case.n_refined, case.n_total, case.n_total)
    return (*found, histogram), (*expected, torch.zeros(histogram.shape, dtype=histogram.dtype)), 0.0


def _select_above(case: Case) -> Compared:
    _, scores, _ = case.scored()
    given = (scores, scores.median().expand_as(scores).contiguous(), case.n_total)
    return case.call(select_above, *given), select_above.reference(*on_cpu(given)), 0.0


def _apply(case: Case) -> Compared:
    (neurons, fidelity, where), layout = case.chosen(), case.layout
    records = case.blobs[:, layout.sketch_bytes:].reshape(-1, layout.record)
    given = (case.x, case.blobs, case.place, records, where, neurons, fidelity, layout, case.gate, case.bias)
    return (case.call(apply, *given),), (apply.reference(*on_cpu(given)),), VALUES


def _mixed(case: Case) -> Compared:
    """`dense` up to a layer's output: weights, bias of down where there are biases, residual."""
    draw, shape = torch.Generator().manual_seed(21), case.shape
    residual = torch.randn(case.n_tokens, shape.hidden, generator=draw)
    bias = (torch.randn(shape.top_k, shape.hidden, generator=draw), torch.arange(shape.top_k).repeat(case.n_tokens, 1))
    mixture = Mixture(case.weight.cpu(), shape.hidden, residual, *(bias if shape.biased else ()))
    given = (case.x, case.blobs, case.place, case.layout, case.gate, case.bias, _there(mixture, case.device))
    return (case.call(dense, *given),), (dense.reference(*on_cpu(given)),), VALUES


def _dense(case: Case) -> Compared:
    given = (case.x, case.blobs, case.place, case.layout, case.gate, case.bias)
    return (case.call(dense, *given),), (dense.reference(*on_cpu(given)),), VALUES


def _whole_sums(case: Case, function: Callable = whole_sums) -> Compared:
    """Not nearly: the same bits."""
    fixed = FixedPoint(*quantize(case.x, case.layout.group, case.layout.padded)[2:])
    neurons, fidelity, where = case.chosen()
    chosen = case.blobs[:, case.layout.sketch_bytes:].reshape(-1, case.layout.record), where, neurons, fidelity
    given = fixed, case.blobs, case.place, *(chosen * (function is chosen_sums)), case.layout, case.gate, case.bias
    return (case.call(function, *given),), (function.reference(*on_cpu(given)),), 0.0


def _dense_of_nan(case: Case) -> Compared:
    """What is no number must not become one: the token that has it ends as not numbers, the others stay."""
    x = case.x.clone()
    x[0, 3] = float("nan")
    found = case.call(dense, x, case.blobs, case.place, case.layout, case.gate, case.bias).isfinite()
    expected = (torch.arange(len(found)) > 0)[:, None, None].expand(found.shape)
    return (found,), (expected,), 0.0


def _dequantize(case: Case) -> Compared:
    made, layout = [], case.layout
    for device in (case.device, "cpu"):
        shape = (len(case.blobs), layout.neurons, layout.hidden)
        halves = [torch.empty(shape[0], n * shape[1], shape[2], dtype=torch.bfloat16, device=device) for n in (2, 1)]
        made.append(halves)
    case.call(dequantize, case.blobs, *made[0], layout)
    dequantize.reference(case.blobs.cpu(), *made[1], layout)
    return tuple(made[0]), tuple(made[1]), SIXTEEN_BITS


def _multiply_tile(case: Case) -> Compared:
    """Prefill's product of packed planes: experts with no rows, one, 17 and two blocks; where Triton makes no use of
    the card's matrix units, no prefill asks for it."""
    draw, shape = torch.Generator().manual_seed(23), case.shape
    ends = torch.tensor([0, 1, 18, 130], dtype=torch.int32)[:len(case.blobs)]
    n, tokens = len(ends), torch.randint(0, 70, (int(ends[-1]),), generator=draw)
    given = (torch.randn(70, shape.hidden, generator=draw), tokens, ends, case.blobs[:n].cpu(), case.layout, case.gate,
             _bias((n,), shape, draw))
    return (case.call(multiply_tile, *_there(given, case.device)),), (multiply_tile.reference(*given),), SIXTEEN_BITS


def _matrices(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes and scales of the trunk's matrices, on the device: queries at 8 and 4 bits, and few rows."""
    draw = torch.Generator().manual_seed(3)
    for n_rows, bits in ((2 * case.shape.hidden, 8), (2 * case.shape.hidden, 4), (64, 4)):
        codes, scales = random_matrix(n_rows, case.shape.hidden, bits, draw)
        yield codes.to(case.device), scales.to(case.device)


def _linear(case: Case) -> Compared:
    given = [(case.x, *matrix) for matrix in _matrices(case)]
    return (tuple(case.call(linear, *each) for each in given),
            tuple(linear.reference(*on_cpu(each)) for each in given), VALUES)


def _dequantize_rows(case: Case) -> Compared:
    made = []
    for codes, scales in _matrices(case):
        out = torch.empty(len(codes), case.shape.hidden, dtype=torch.bfloat16, device=case.device)
        case.call(dequantize_rows, codes, scales, out)
        expected = torch.empty(out.shape, dtype=out.dtype)
        dequantize_rows.reference(codes.cpu(), scales.cpu(), expected)
        made.append((out, expected))
    return *map(tuple, zip(*made, strict=True)), SIXTEEN_BITS


def _linears(case: Case) -> Compared:
    """Queries, keys and values behind a norm in one launch, a router's plain numbers, and what is added."""
    x, draw = case.x, torch.Generator().manual_seed(5)
    coded = tuple((*random_matrix(n_rows, case.shape.hidden, 4, draw), None) for n_rows in (128, 32, 32))
    plain = ((torch.randn(8, case.shape.hidden, generator=draw).bfloat16(), None, torch.ones(8)),)
    made = []
    for parts, rest in ((coded, (torch.rand(case.shape.hidden, generator=draw), 1e-6)),
                        (plain, (None, 0.0, torch.rand(case.n_tokens, 8, generator=draw)))):
        there = _there((parts, rest), case.device)
        made.append((case.call(linears, x, Matrices(there[0]), *there[1])[0],
                     linears.reference(x.cpu(), Matrices(parts), *rest)[0]))
    return *map(tuple, zip(*made, strict=True)), VALUES


def _best_rows(case: Case) -> Compared:
    """Of a head in two planes all rows, and the best 20, told by a number and by a tensor."""
    codes, scales = random_matrix(512, case.shape.hidden, 8, torch.Generator().manual_seed(13))
    head, x = Matrices(((split(codes), scales, None),)), case.x[:1]
    there, found, expected = Matrices(_there(head.parts, case.device)), [], []
    for n_best in (0, 20, torch.tensor([20])):
        made = case.call(best_rows, x, there, _there(n_best, case.device)), best_rows.reference(x.cpu(), head, n_best)
        for rows, one in zip((found, expected), made, strict=True):
            rows.append(one.topk(20).values if isinstance(n_best, Tensor) or n_best else one)
    return tuple(found), tuple(expected), VALUES


def _there(parts: Any, device: str) -> Any:
    """The same with its tensors on the device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, parts)


def _attended(case: Case, heads: Heads, turned: int, position: int = 70) -> Compared:
    """In a 16-bit cache of 80 rows, of which those that may not be read are no numbers; what it leaves there."""
    draw, first = torch.Generator().manual_seed(7), max(0, position + 1 - heads.window) if heads.window else 0
    projected = torch.randn(case.n_tokens, heads.width, generator=draw).bfloat16()
    projected = projected if heads.held else projected.float()
    angles = torch.randn(case.n_tokens, turned, generator=draw)
    numbers, seen = torch.randn(2, 1, 2, 80, 128, generator=draw), position + heads.held * case.n_tokens
    readable = torch.arange(first, seen) % 80
    kept = torch.full((2, 1, 2, 81, 128), torch.nan).bfloat16()
    kept[:, :, :, readable] = numbers[:, :, :, readable].bfloat16()
    rows, made = torch.arange(position, position + case.n_tokens) % 80, []
    for function, device in ((partial(case.call, attend), case.device), (attend.reference, "cpu")):
        keys, values = kept.clone().to(device)
        out = function(projected.to(device), torch.stack((angles.cos(), angles.sin())).to(device), keys, values,
                       torch.tensor(position, device=device), _there(heads, device), rows.to(device))
        made.append((out, keys.nan_to_num(), values.nan_to_num()))
    return *made, SIXTEEN_BITS


def _attend_windowed(case: Case) -> Compared:
    """With sinks, where the rows have turned round."""
    norms = torch.ones(128), torch.ones(128), 1e-6
    return _attended(case, Heads(16, 2, 128, 128 ** -0.5, *norms, window=60, sinks=torch.ones(16)), 128, 130)


def _attend_gated(case: Case) -> Compared:
    """A quarter of each head turns, and a gate stands behind it."""
    return _attended(case, Heads(8, 2, 128, 128 ** -0.5, torch.ones(128), torch.ones(128), 1e-6, gated=True), 32)


def _attend_latent(case: Case) -> Compared:
    """GLM-4.7-Flash's heads, fewer of them, and DeepSeek-V2's, behind 70 rows of a 16-bit cache whose further rows are
    no numbers."""
    draw, position, made = torch.Generator().manual_seed(19), 70, [[], []]
    for (still, values), bits, is_second in (((192, 256), 4, False), ((128, 128), 8, True)):
        expand = Matrices(((*random_matrix(5 * (still + values), 512, bits, draw), None),))
        latent = Latent(5, 512, still, 64, values, 0.06, torch.rand(512, generator=draw), 1e-6, expand, True, is_second)
        given = [torch.randn(shape, generator=draw) for shape in (
            (case.n_tokens, 5 * (still + 64)), (case.n_tokens, 576), (2, case.n_tokens, 64))]
        kept = [torch.randn(1, 1, 80, size, generator=draw).bfloat16() for size in (512, 64)]
        for part in kept:
            part[:, :, position:] = torch.nan
        places, end = torch.arange(position, position + case.n_tokens), position + case.n_tokens
        for found, function, device in ((made[0], partial(case.call, attend_latent), case.device),
                                        (made[1], attend_latent.reference, "cpu")):
            cache = [part.clone().to(device) for part in kept]
            own = latent._replace(norm=latent.norm.to(device), expand=Matrices(_there(expand.parts, device)))
            out = function(*_there(tuple(given), device), *cache, torch.tensor(position, device=device), own,
                           places.to(device))
            found += out, *(part[:, :, :end] for part in cache)
    return tuple(made[0]), tuple(made[1]), SIXTEEN_BITS


def _delta(case: Case) -> Compared:
    """Qwen3.5's heads, fewer of them; the state goes to a second row, and the first stays as it was."""
    draw, made = torch.Generator().manual_seed(13), []
    mixer = Mixer(2, 4, 128, 128, False, torch.randn(1024, 4, generator=draw), -torch.rand(4, generator=draw),
                  torch.rand(4, generator=draw), torch.rand(128, generator=draw), 1e-6)
    given = [torch.randn(shape, generator=draw) for shape in ((case.n_tokens, mixer.width), (2, 1024, 4),
                                                              (2, 4, 128, 128))]
    given[1] = given[1].bfloat16()
    for function, device in ((partial(case.call, delta), case.device), (delta.reference, "cpu")):
        there = [tensor.clone().to(device) for tensor in given]
        row = torch.ones(1, dtype=torch.int64, device=device)
        made.append((function(*there, _there(mixer, device), row), *there[1:]))
    return *made, SIXTEEN_BITS


def _gated(case: Case) -> Compared:
    """A shared expert's way back with its logit, and one without."""
    draw, found, expected = torch.Generator().manual_seed(17), [], []
    rows = torch.randn(case.n_tokens, 1 + 2 * 512, generator=draw)
    back, residual = ((*random_matrix(64, 512, 4, draw), None),), torch.randn(case.n_tokens, 64, generator=draw)
    for part in (rows, rows[:, 1:]):
        there = _there((part, back, residual), case.device)
        found.append(case.call(gated_linears, there[0], Matrices(there[1]), there[2]))
        expected.append(gated_linears.reference(part, Matrices(back), residual))
    return tuple(found), tuple(expected), VALUES


def _settle(case: Case) -> Compared:
    """Gemma's two: behind attention, with what the experts are given; behind the dense part and the experts."""
    draw, found, expected = torch.Generator().manual_seed(19), [], []
    rows, norms = torch.randn(3, case.n_tokens, 2816, generator=draw), torch.rand(4, 2816, generator=draw)
    for how in (Settling(norms[0], 1e-6, then=norms[3]), Settling(norms[0], 1e-6, (norms[1], norms[2]), torch.ones(1))):
        given = rows[0], rows[1], how, rows[2]
        found += case.call(settle, *_there(given, case.device))
        expected += settle.reference(*given)
    back, how = ((*random_matrix(2816, 512, 4, draw), None),), Settling(norms[0], 1e-6, then=norms[3])
    given = rows[0, :, :512].contiguous(), back, rows[1], how
    x, parts, *rest = _there(given, case.device)
    found += case.call(settled_linears, x, Matrices(parts), *rest)
    expected += settled_linears.reference(given[0], Matrices(back), *given[2:])
    return tuple(found), tuple(expected), VALUES


def _choose(case: Case) -> Compared:
    """The best 8 of 128, Qwen3's and DeepSeek's, with a shared expert behind them and without, or read behind another
    norm; an id that is another one is further off than VALUES. What is quantised counts by its scales."""
    draw, found, expected = torch.Generator().manual_seed(11), [], []
    hidden = case.shape.hidden
    x, norms = torch.randn(case.n_tokens, hidden, generator=draw), torch.rand(2, hidden, generator=draw) + 0.5
    router = (torch.randn(128, hidden, generator=draw).div(hidden ** 0.5).bfloat16(), None, None)
    more = tuple((*random_matrix(32, hidden, 4, draw), None) for _ in range(2))
    of_groups = Choice(8, True, True, torch.rand(128, generator=draw), 8, 4, 2, 2.5)
    for choice, behind, beside in ((Choice(8, True), (), ()), (of_groups, more, ()), (Choice(8, True), (), more)):
        for device, function, made in ((case.device, partial(case.call, choose), found),
                                       ("cpu", choose.reference, expected)):
            own, parts, other, given, activation = _there((choice, (router, *behind), beside, norms, x), device)
            second = Reader(Matrices(other), given[1], 1e-6) if beside else None
            entrance = Entrance(Reader(Matrices(parts), given[0], 1e-6), 128, own, second)
            rows, normed, ids, shares, _, *quantised = function(activation, entrance, case.layout)
            made += rows if rows.shape[1] else normed, normed, ids, shares, quantised[0], quantised[3]
    return tuple(found), tuple(expected), VALUES


CHECKS = {"quantize_activation": _quantize, "quantize": _quantize_both, "score": _score,
          "histogram of score": _histogram, "score_up": _score_up, "select": _select, "select_above": _select_above,
          "apply": _apply, "dense": _dense, "mixture": _mixed, "whole_sums": _whole_sums, "best_rows": _best_rows,
          "chosen_sums": partial(_whole_sums, function=chosen_sums), "dense of what is no number": _dense_of_nan,
          "dequantize": _dequantize, "multiply_tile": _multiply_tile, "linear": _linear, "gated": _gated,
          "dequantize_rows": _dequantize_rows, "linears": _linears, "choose": _choose, "settle": _settle,
          "attend": partial(_attended, heads=Heads(16, 2, 128, 128 ** -0.5), turned=128), "delta": _delta,
          "attend held": partial(_attended, heads=Heads(16, 2, 128, 0.1, window=60, held=True), turned=0, position=130),
          "attend gated": _attend_gated, "attend windowed": _attend_windowed, "attend_latent": _attend_latent}


def kernels() -> Iterator[Row]:
    return checked(SHAPES[:3])


def more_kernels() -> Iterator[Row]:
    return checked(SHAPES[3:])


def checked(shapes: Iterable[KernelShape], device: str = "cuda", tokens: tuple[int, ...] = (1, 4)) -> Iterator[Row]:
    for shape in shapes:
        for n_tokens in tokens:
            case = Case(shape, n_tokens, device)
            where = f"{shape.model}, {shape.hidden}/{shape.neurons} top-{shape.top_k}, {n_tokens} tokens"
            for name, check in CHECKS.items():
                yield compared(name, where, lambda check=check, case=case: check(case))
            yield {"measured": "kernels against references", "case": where, "seconds_with_compiling": case.seconds}


def compared(name: str, where: str, check: Callable[[], Compared]) -> Row:
    """Whatever the check runs into is what it found."""
    try:
        found, expected, share = check()
        worst = max(_difference(a.cpu(), b, share) for a, b in zip(found, expected, strict=True))
        unit = "of the largest value" if share else "entries differ"
        return Finding(name, worst <= share, worst, unit, case=where).row()
    except Exception as error:
        last = " < ".join(line.strip() for line in traceback.format_exc().strip().splitlines()[-4:-1])
        return Finding(name, False, case=where, note=f"{type(error).__name__}: {error} ({last})"[:500]).row()


def _difference(found: Tensor, expected: Tensor, share: float) -> float:
    """Of values the largest difference as a share of the largest value, infinite where numbers are none; of all else
    how many entries differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not share:
        return float((found != expected).sum())
    if not found.isfinite().all():
        return float("inf")
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30))
