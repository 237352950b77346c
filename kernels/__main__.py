"""`python -m kernels`: every kernel on the best device of this computer against its reference, once, in seconds.

On a CUDA device Triton's: driver, build of torch, C compiler and Triton are shown to work together, and the card to
read page-locked memory, before anybody waits for an answer. Elsewhere those that are compiled for the processor; where
they cannot be used, the last line says so. Exit code 3 if one gives other numbers, or none.
"""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils._pytree import tree_leaves, tree_map

from kernels.activation import FixedPoint, Gate, NeuronBias, quantize, quantize_activation
from kernels.apply import apply, chosen_sums
from kernels.dense import dense, dequantize, grouped, multiply_tile, whole_sums
from kernels.dispatch import compile_all
from kernels.evict import age
from kernels.fill import fill
from kernels.layout import Layout
from kernels.planes import Nested, record_rows, sketch_rows
from kernels.pool import new_pool, take
from kernels.resolve import Link, choose_neurons, look_ahead, resolve_experts, resolve_neurons
from kernels.score import score, score_up
from kernels.select import BINS, histogram_of, select, select_above
from kernels.trunk.attend import Heads, attend
from kernels.trunk.choose import Entrance, Reader, choose
from kernels.trunk.delta import Mixer, delta
from kernels.trunk.gated import gated, gated_linears
from kernels.trunk.head import best_rows, split
from kernels.trunk.latent import Latent, attend_latent
from kernels.trunk.linear import Matrices, dequantize_rows, linear, linears
from kernels.trunk.route import Choice, route
from kernels.trunk.settle import Settling, settle, settled_linears
from kernels.weigh import Mixture

Tensor = torch.Tensor
Case = tuple[Callable, tuple]       # a function of kernels/, what it is given on the host
LAYOUT = Layout(256, 96, 64)
VALUES = 1e-3                       # of the largest number: a card computes with activations of 16 bits
SUMMED_IN_16_BITS = 1e-2            # where its sums have no more, either


def main() -> int:
    on_card = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_card else f"processor, {torch.get_num_threads()} threads"
    said, start = f"Self-check on {name}, torch {torch.__version__}: ", time.perf_counter()
    without = "" if on_card else compile_all()
    try:
        found = [(function.__name__, agrees(function, function, given, "cuda" if on_card else "cpu"))
                 for function, given in cases()
                 if (function.is_on_device if on_card else function.is_compiled)]
    except (RuntimeError, ImportError, OSError, AssertionError) as error:
        print(f"{said}{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}")
        return 3
    wrong = sorted({kernel for kernel, good in found if not good})
    took = f"{len(dict(found))} against their references in {time.perf_counter() - start:.1f} s"
    print(said + (f"wrong numbers from {', '.join(wrong)}." if wrong else without or f"the kernels work. {took}."))
    return 3 if wrong else 0


def agrees(run: Callable, function: Callable, given: tuple, device: str) -> bool:
    """Whether `run` on the device gives, and leaves in what it was given, what the function's reference does."""
    there, here = (tree_map(lambda leaf, to=to: _copied(leaf, to), given) for to in (device, "cpu"))
    if function is fill and device == "cuda":
        there = (given[0].pin_memory(), *there[1:])     # far memory, which the kernel reads where it is
    results = zip(tree_leaves((run(*there), there)), tree_leaves((function.reference(*here), here)), strict=True)
    share = SUMMED_IN_16_BITS if function is multiply_tile else VALUES
    return all(_same(mine, theirs, share) for mine, theirs in results if isinstance(mine, Tensor) and mine.numel())


def _copied(leaf, device: str):
    if isinstance(leaf, Matrices):
        return Matrices(tree_map(lambda part: _copied(part, device), leaf.parts))
    return leaf.clone().to(device) if isinstance(leaf, Tensor) else leaf


def _same(mine: Tensor, theirs: Tensor, share: float) -> bool:
    mine = mine.cpu()
    if not mine.is_floating_point():
        return torch.equal(mine, theirs)
    largest = float(theirs[theirs.isfinite()].abs().max())       # -inf: a row that was left out
    return torch.allclose(mine, theirs, rtol=0, atol=share * largest)


def cases() -> Iterator[Case]:
    """Every function that has a twin, once: two tokens, two of three experts."""
    draw = torch.Generator().manual_seed(0)
    yield from _products(draw)
    yield from _places(draw)
    for bits, width in ((8, 256), (4, 128)):
        codes = torch.randint(0, 128, (96, width), generator=draw).to(torch.int8 if bits == 8 else torch.uint8)
        scales = (torch.rand(96, 4, *([2] if bits == 4 else []), generator=draw) / 2**bits).half()
        yield linear, (torch.randn(2, 256, generator=draw), codes, scales)
        yield dequantize_rows, (codes, scales, torch.zeros(96, 256))
        if bits == 8:       # rows of growing length: most of them are left out
            nested = Matrices(((split(codes), scales * torch.linspace(0.01, 1, 96)[:, None].half(), None),))
            yield best_rows, (torch.randn(1, 256, generator=draw), nested, 4, torch.ones(256))
    yield linears, (torch.randn(2, 256, generator=draw), Matrices(((codes, scales, torch.ones(96)),)), torch.ones(256))
    yield route, (torch.randn(2, 8, generator=draw), Choice(3, True))
    yield route, (torch.randn(2, 8, generator=draw), Choice(3, True, True, torch.rand(8, generator=draw), 4, 2, 2, 2.5))
    cache = [torch.randn(1, 2, 9, 16, generator=draw) for _ in range(2)]
    for rest in ({}, dict(window=4, sinks=torch.ones(2))):
        yield attend, (torch.randn(2, 96, generator=draw), torch.randn(2, 2, 16, generator=draw), *cache, 5,
                       Heads(2, 2, 16, 0.25, **rest))
    tensors = [torch.rand(shape, generator=draw) for shape in ((128, 4), (4,), (4,), (16,))]
    mixer = Mixer(2, 4, 16, 16, False, tensors[0], -tensors[1], *tensors[2:], 1e-6)
    yield delta, (torch.randn(2, mixer.width, generator=draw), torch.randn(1, 128, 4, generator=draw),
                  torch.randn(1, 4, 16, 16, generator=draw), mixer)
    expand = Matrices(((codes[:80, :32].contiguous(), scales[:80, :1].contiguous(), None),))
    latent = Latent(2, 64, 16, 16, 24, 0.2, torch.ones(64), 1e-6, expand, True)
    yield attend_latent, (torch.randn(2, 64, generator=draw), torch.randn(2, 80, generator=draw),
                          torch.randn(2, 2, 8, generator=draw), torch.randn(1, 1, 9, 64, generator=draw),
                          torch.randn(1, 1, 9, 16, generator=draw), 5, latent)
    norms = torch.rand(5, 100, generator=draw)
    yield settle, (torch.randn(2, 100, generator=draw), torch.randn(2, 100, generator=draw),
                   Settling(norms[0], 1e-6, (norms[1], norms[2]), norms[3, :1], norms[4]), torch.ones(2, 100))
    yield gated, (torch.randn(2, 65, generator=draw),)
    yield gated, (torch.randn(2, 64, generator=draw),)
    back = Matrices(((codes, scales, None),))
    yield gated_linears, (torch.randn(2, 513, generator=draw), back, torch.ones(2, 96))
    yield settled_linears, (torch.randn(2, 256, generator=draw), back, torch.ones(2, 96), Settling(norms[0, :96], 1e-6))
    router, x = torch.randn(8, 256, generator=draw) / 16, torch.randn(2, 256, generator=draw)
    readers = [Reader(Matrices(parts), torch.ones(256), 1e-6) for parts in (((router, None, None),), back.parts)]
    yield choose, (x, Entrance(readers[0], 8, Choice(3, True), readers[1]), LAYOUT, x.flip(0))


def _products(draw: torch.Generator) -> Iterator[Case]:
    n, x, gate = LAYOUT.neurons, torch.randn(2, LAYOUT.padded, generator=draw), Gate()
    blobs = torch.stack([_blob(draw) for _ in range(3)])
    place, weight = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32), torch.rand(2, 2, generator=draw)
    codes, scales = quantize_activation.reference(x, LAYOUT.group)
    yield quantize_activation, (x, LAYOUT.group)
    yield quantize, (x[:, :200].contiguous(), LAYOUT.group, LAYOUT.padded)
    bias = NeuronBias(*torch.rand(2, 4, n, generator=draw), torch.tensor([[3, 1], [0, 2]]))
    yield score, (codes, scales, blobs, place, weight, LAYOUT, gate, bias)
    yield score_up, (codes, scales, blobs, place, LAYOUT)
    scores, budget = torch.rand(2, 2 * n, generator=draw), [torch.tensor([k], dtype=torch.int32) for k in (20, 50)]
    yield select, (scores, *budget, 60, histogram_of(scores))
    yield select_above, (scores, torch.full_like(scores, 0.8), 60)
    neurons, fidelity = select.reference(scores, *budget, 60)
    records = blobs[:, LAYOUT.sketch_bytes:].reshape(-1, LAYOUT.record)
    where = place.gather(1, (neurons.clamp_min(0) // n).long()) * n + neurons.clamp_min(0) % n
    mixture = Mixture(weight, LAYOUT.hidden - 5, torch.randn(2, LAYOUT.hidden - 5, generator=draw))
    yield apply, (x, blobs, place, records, where, neurons, fidelity, LAYOUT, gate, bias, mixture)
    yield dense, (x, blobs, place, LAYOUT, gate)
    tokens, ends = torch.arange(70) % 2, torch.tensor([3, 3, 70], dtype=torch.int32)
    yield multiply_tile, (x[:, :LAYOUT.hidden].contiguous(), tokens, ends, blobs, LAYOUT, gate)
    yield grouped, (x, [blobs[2], blobs[0]], [1, 1], LAYOUT, gate)
    fixed = FixedPoint(*quantize.reference(x, LAYOUT.group)[2:])
    yield whole_sums, (fixed, blobs, place, LAYOUT, gate)
    yield chosen_sums, (fixed, blobs, place, records, where, neurons, fidelity, LAYOUT, gate, bias)
    yield dequantize, (blobs, torch.zeros(3, 2 * n, LAYOUT.hidden), torch.zeros(3, n, LAYOUT.hidden), LAYOUT)


def _places(draw: torch.Generator) -> Iterator[Case]:
    """The tables of near memory, and the copy of what is missing."""
    clock, done = torch.tensor([3], dtype=torch.int32), torch.zeros((), dtype=torch.bool)
    counts, objects = torch.zeros(5, dtype=torch.int64), torch.randperm(200, generator=draw)[:40].int()
    pool, need = new_pool(200, 30), torch.full((40,), LAYOUT.record, dtype=torch.int32)
    yield take, (pool, objects, need, clock)
    take.reference(pool, objects, need, clock)
    yield age, (pool, clock + 1, torch.tensor([10], dtype=torch.int32))
    ids = torch.tensor([[0, 2]])
    # Everything is missing, so that the whole list of misses is written.
    yield resolve_experts, (new_pool(3, 1), ids, 0, LAYOUT.sketch_bytes, clock, counts, done)
    neurons = torch.arange(0, 2 * LAYOUT.neurons, 4, dtype=torch.int32)[None]
    fidelity = (torch.arange(neurons.numel()) % 2).to(torch.int8)[None]
    yield resolve_neurons, (new_pool(3 * LAYOUT.neurons, 30), neurons, fidelity, ids, 0, LAYOUT, clock, counts, done)
    far = torch.randint(0, 256, (3, LAYOUT.neurons, LAYOUT.record), dtype=torch.uint8, generator=draw)
    turn, scores = torch.zeros(4, dtype=torch.int32), torch.rand(1, 2 * LAYOUT.neurons, generator=draw)
    histogram = torch.cat((histogram_of(scores), torch.zeros(2, BINS, dtype=torch.int32)))
    budget = [torch.tensor([k], dtype=torch.int32) for k in (20, 50)]
    yield choose_neurons, (scores, *budget, 60, histogram, ids, new_pool(3 * LAYOUT.neurons, 30), 0, LAYOUT, clock,
                           counts, done, Link(far, torch.zeros(90, LAYOUT.record, dtype=torch.uint8), turn))
    yield look_ahead, (torch.randn(1, 64, generator=draw), torch.randn(3, 64, generator=draw), 2, new_pool(3, 2), 0,
                       LAYOUT.record, clock, counts, done, clock + 2**30,
                       Link(far[:, :1], torch.zeros(2, LAYOUT.record, dtype=torch.uint8), turn))
    source, nothing = torch.randperm(3 * LAYOUT.neurons, generator=draw)[:40].int(), torch.zeros(40, dtype=torch.int32)
    yield fill, (far, source, torch.zeros(40, LAYOUT.record, dtype=torch.uint8), torch.arange(40, dtype=torch.int32),
                 nothing, need)


def _blob(draw: torch.Generator) -> Tensor:
    """An expert of random codes, its values about as large as a real one's."""
    def matrix() -> Nested:
        shape = (LAYOUT.neurons, LAYOUT.groups)
        pairs = []
        for top in (3, 15):
            scale = (0.5 + torch.rand(shape, generator=draw)) / top / LAYOUT.hidden ** 0.5
            pairs.append(torch.stack((scale, -scale * top / 2), dim=-1).half())
        codes = torch.randint(0, 16, (LAYOUT.neurons, LAYOUT.padded), dtype=torch.uint8, generator=draw)
        return Nested(codes, *pairs)
    gate, up, down = matrix(), matrix(), matrix()
    sketch = sketch_rows(gate, up, LAYOUT).flatten()
    sketch = torch.nn.functional.pad(sketch, (0, LAYOUT.sketch_bytes - len(sketch)))
    return torch.cat((sketch, record_rows(gate, up, down, LAYOUT).flatten()))


if __name__ == "__main__":
    sys.exit(main())
