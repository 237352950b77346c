"""`score`, `apply` and `dense` alone, at a catalogue model's shape, on the whole card and on 28 multiprocessors.

28 are an RTX 3060's: a large card hides what costs a small one its time, arithmetic.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

import torch

from engine.bench.blobs import random_blobs
from engine.bench.gpu_kernels import Run, Time, milliseconds
from engine.bench.rows import Row
from engine.bench.synthetic import SHARES, Shape
from kernels.activation import Gate, quantize_activation
from kernels.apply import apply
from kernels.dense import dense
from kernels.layout import Layout
from kernels.score import score
from kernels.select import BINS, DOWN_ONLY, REFINED

SMALL = 28              # multiprocessors
PLACES = 16             # different sets of experts, one after the other: together more than a cache holds


def must_read(layout: Layout, top_k: int, refined: int, down_only: int) -> dict[str, int]:
    """Bytes of near memory that one call cannot do without."""
    return {"score": top_k * layout.neurons * layout.sketch_row,
            "apply": refined * layout.record + down_only * layout.prefix + (refined + down_only) * layout.sketch_row,
            "dense": top_k * layout.neurons * (layout.sketch_row + layout.record)}


def measured(shape: Shape, device: str = "cuda", time: Time = milliseconds) -> Iterator[Row]:
    """Rows for level `fast`'s shares of a layer's neurons. time: milliseconds of a run."""
    spec, layout = shape.spec, shape.layout
    refined, down_only = (int(share * spec.top_k * spec.neurons) for share in SHARES["fast"])
    n_bytes = must_read(layout, spec.top_k, refined, down_only)
    todo = runs(shape, refined, down_only, device)
    for sms in (None, SMALL):
        known = {"model": shape.name, "hidden": spec.hidden, "sms": sms or "all"}
        try:
            with few_multiprocessors(sms):
                for name, run in todo.items():
                    took = time(run)
                    yield {"measured": "kernels", **known, "name": name, "us": 1e3 * took, "bytes": n_bytes[name],
                           "gb_per_second": n_bytes[name] / took / 1e6}
        except (RuntimeError, AttributeError, TypeError) as error:  # whatever a version without them raises
            if sms is None:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            yield {"measured": "kernels", **known, "sentence": "Green contexts do not work with this PyTorch and "
                   f"driver ({reason}); only the whole card was measured."}


@contextmanager
def few_multiprocessors(n: int | None) -> Iterator[None]:
    """Inside, kernels run on n multiprocessors (compute capability 9.0 and later round up to 8); None: on all."""
    if n is None:
        yield
        return
    from torch.cuda.green_contexts import GreenContext
    context = GreenContext.create(num_sms=n)
    context.set_context()
    try:
        yield
    finally:
        context.pop_context()


def runs(shape: Shape, refined: int, down_only: int, device: str, n_experts: int | None = None) -> dict[str, Run]:
    """One call of each kernel, on other experts every time. n_experts: made-up ones, by default as many as PLACES calls
    need, or the model has."""
    spec, layout, draw, gate = shape.spec, shape.layout, torch.Generator().manual_seed(0), Gate()
    blobs = random_blobs(layout, n_experts or min(spec.experts, PLACES * spec.top_k)).to(device)
    sketches = blobs[:, :layout.sketch_bytes].contiguous()
    records = blobs[:, layout.sketch_bytes:].reshape(-1, layout.record)
    x = torch.randn(1, layout.padded, generator=draw).to(device)
    codes, scales = quantize_activation(x, layout.group)
    weight = torch.full((1, spec.top_k), 1 / spec.top_k, device=device)
    histogram = torch.zeros(1, BINS, dtype=torch.int32, device=device)
    neurons = torch.randperm(spec.top_k * spec.neurons, generator=draw)[:refined + down_only].sort().values.int()[None]
    fidelity = torch.full_like(neurons, DOWN_ONLY, dtype=torch.int8)
    fidelity[0, torch.randperm(refined + down_only, generator=draw)[:refined]] = REFINED
    picks = [torch.randperm(len(blobs), generator=draw)[:spec.top_k].int()[None]
             for _ in range(max(PLACES, len(blobs) // spec.top_k))]
    where = [_record_places(place[0], neurons[0], layout.neurons)[None].to(device) for place in picks]
    places, chosen = [place.to(device) for place in picks], (neurons.to(device), fidelity.to(device))
    scored, applied, whole = cycle(places), cycle(zip(places, where, strict=True)), cycle(places)

    def sparse() -> torch.Tensor:
        place, record_place = next(applied)
        return apply(x, sketches, place, records, record_place, *chosen, layout, gate)
    return {"score": lambda: score(codes, scales, sketches, next(scored), weight, layout, gate, histogram=histogram),
            "apply": sparse, "dense": lambda: dense(x, blobs, next(whole), layout, gate)}


def _record_places(experts: torch.Tensor, neurons: torch.Tensor, n_neurons: int) -> torch.Tensor:
    """Records lie expert after expert: int32 [K] for neurons 0..k*I-1 of the routed experts [k]."""
    return experts[(neurons // n_neurons).long()] * n_neurons + neurons % n_neurons
