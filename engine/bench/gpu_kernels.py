"""What decides the design on a graphics card, without a model: bandwidths, `fill`, nodes of a graph, single kernels.

Each measurement yields rows (plain dictionaries) for tests/bench/<card>.csv. `fill` is held against the copy engine by
record size, burst, blocks, page-locked size and page size; a graph's node is timed in chains of empty and of working
kernels. `score`, `apply` and `dense` run at a catalogue model's shape, on the whole card and on 28 multiprocessors (an
RTX 3060's): a large card hides what costs a small one its time, arithmetic. Whole steps: engine/bench/step.py.
"""
from __future__ import annotations

import csv
import datetime
import mmap
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from statistics import median

import torch

from engine.bench.step_profile import Row, Speeds
from engine.bench.synthetic import SHARES, Blobs, Shape
from engine.core import MachineError, UserError
from engine.machine.pinned_memory import CudaDriver, HostMemory
from engine.units import size
from kernels.activation import Gate, quantize_activation
from kernels.apply import apply
from kernels.dense import dense
from kernels.fill import fill
from kernels.gpu import fill as gpu_fill
from kernels.layout import Layout
from kernels.score import score
from kernels.select import BINS, DOWN_ONLY, REFINED

MIB = 2**20
RECORDS = (1152, 2304, 4608, 9216)              # bytes; multiples of 128
BURSTS = (10, 100, 450, 1000, 4000, 16000)      # records of one call
BLOCKS = (4, 8, 16, 32, 64, 128)
CHAIN = (100, 1000, 4000)
REPEATS = 20
SLEEP_CYCLES = 10**7    # some milliseconds
VRAM_BYTES, LINK_BYTES = 256 * MIB, 64 * MIB    # several times the largest cache of a card
SMALL = 28              # multiprocessors
PLACES = 16             # different sets of experts, one after the other: together more than a cache holds
Run = Callable[[], object]


def milliseconds(run: Run, repeats: int = REPEATS) -> float:
    """Median time of `run` on the card, after a first call that does not count.

    The card sleeps first, so that everything is queued by the time it begins: what the host needs for a launch is more
    than a small kernel takes.
    """
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def reserve_vram(left_bytes: int | None) -> torch.Tensor | None:
    """Take what the card has above `left_bytes`, so that it is a smaller one for as long as the result lives.

    UserError: the card has less. MachineError: others have taken some of it.
    """
    if left_bytes is None:
        return None
    return torch.empty(bytes_above(left_bytes, *torch.cuda.mem_get_info()), dtype=torch.uint8, device="cuda")


def bytes_above(left_bytes: int, free: int, total: int) -> int:
    if left_bytes > total:
        raise UserError(f"This card has {size(total)} of memory; give --vram at most that, not {size(left_bytes)}.")
    if total - left_bytes > free:
        raise MachineError(f"Other programs use {size(total - free)} of the card, more than --vram leaves; close them.")
    return total - left_bytes


def speeds() -> Speeds:
    """What a copy within the card reaches (its bytes are read and written), and one to it from page-locked memory."""
    within, over = _copies()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return Speeds(2e3 * VRAM_BYTES / within, 1e3 * LINK_BYTES / over)


def _copies() -> tuple[float, float]:
    source, target = (torch.empty(VRAM_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    host = torch.ones(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    return (milliseconds(lambda: target.copy_(source)),
            milliseconds(lambda: target[:LINK_BYTES].copy_(host, non_blocking=True)))


def bandwidth_row(found: Speeds) -> Row:
    return {"measured": "bandwidth", "vram_gb_per_second": found.vram / 1e9, "link_gb_per_second": found.link / 1e9}


class SmallPages(HostMemory):
    """The same memory in pages of 4 KiB, to see what huge ones are worth."""

    def _map(self, n_bytes: int) -> None:
        super()._map(n_bytes)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._mapped.madvise(mmap.MADV_NOHUGEPAGE)


def fills(total_bytes: int, small_pages: bool = False) -> Iterator[Row]:
    """`fill` from page-locked memory of `total_bytes`, random records, against one copy of the same bytes."""
    memory = (SmallPages if small_pages else HostMemory)(total_bytes, CudaDriver())
    known = {"measured": "fill", "total": total_bytes, "pages": "small" if small_pages else "huge"}
    if memory.sentence:
        yield known | {"sentence": memory.sentence}
    locked = memory.bytes[:memory.locked_bytes]
    locked[::4096] = 1  # every page is there
    draw, before = torch.Generator().manual_seed(0), gpu_fill.WARPS
    try:
        for record in RECORDS:
            far = locked[:len(locked) // record * record].view(1, -1, record)
            for burst in (n for n in BURSTS if n <= far.shape[1]):
                copied = milliseconds(_copy(locked, burst * record))
                for gpu_fill.WARPS in BLOCKS:
                    took = milliseconds(_fill(far, burst, draw))
                    yield known | {"record": record, "burst": burst, "blocks": gpu_fill.WARPS,
                                   "gb_per_second": burst * record / took / 1e6, "of_copy_engine": copied / took}
    finally:
        gpu_fill.WARPS = before
        memory.close()


def _copy(locked: torch.Tensor, n_bytes: int):
    target = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
    return lambda: target.copy_(locked[:n_bytes], non_blocking=True)


def _fill(far: torch.Tensor, burst: int, draw: torch.Generator):
    """Other records every time: the tables of pages that were just read are at hand."""
    near = torch.empty(burst, far.shape[2], dtype=torch.uint8, device="cuda")
    sources = cycle([torch.randint(far.shape[1], (burst,), generator=draw, dtype=torch.int32).cuda()
                     for _ in range(REPEATS + 1)])
    place = torch.arange(burst, dtype=torch.int32, device="cuda")
    have, need = torch.zeros_like(place), torch.full_like(place, far.shape[2])
    return lambda: fill(far, next(sources), near, place, have, need)


def nodes() -> Iterator[Row]:
    """A graph of n dependent kernels over 4 bytes, 20 KB and 5 MB; and the same with a fork beside every tenth."""
    for n_bytes in (4, 20 << 10, 5 << 20):
        for n in CHAIN:
            x, y = (torch.zeros(n_bytes // 4, device="cuda") for _ in range(2))
            for fork in (False, True):
                graph = _chain(x, y, n, fork)
                took = milliseconds(graph.replay)
                yield {"measured": "node", "bytes": n_bytes, "nodes": n, "fork": fork, "us_per_node": 1e3 * took / n}


def _chain(x: torch.Tensor, y: torch.Tensor, n: int, fork: bool) -> torch.cuda.CUDAGraph:
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    x.add_(1)
    y.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for i in range(n):
            if fork and i % 10 == 0:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    y.add_(1)
            x.add_(1)
            if fork and i % 10 == 9:    # CHAIN is a multiple of 10: no branch is left open
                torch.cuda.current_stream().wait_stream(side)
    return graph


def must_read(layout: Layout, top_k: int, refined: int, down_only: int) -> dict[str, int]:
    """Bytes of near memory that one call cannot do without."""
    return {"score": top_k * layout.neurons * layout.sketch_row,
            "apply": refined * layout.record + down_only * layout.prefix + (refined + down_only) * layout.sketch_row,
            "dense": top_k * layout.neurons * (layout.sketch_row + layout.record)}


def single_kernels(shape: Shape, device: str = "cuda", time: Callable[[Run], float] = milliseconds) -> Iterator[Row]:
    """Rows for level `fast`'s shares of a layer's neurons. time: milliseconds of a run."""
    spec, layout = shape.spec, shape.layout
    refined, down_only = (int(share * spec.top_k * spec.neurons) for share in SHARES["fast"])
    n_bytes = must_read(layout, spec.top_k, refined, down_only)
    runs = _runs(shape, refined, down_only, device)
    for sms in (None, SMALL):
        known = {"model": shape.name, "hidden": spec.hidden, "sms": sms or "all"}
        try:
            with few_multiprocessors(sms):
                for name, run in runs.items():
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


def _runs(shape: Shape, refined: int, down_only: int, device: str) -> dict[str, Run]:
    """One call of each kernel, on other experts every time."""
    spec, layout, draw, gate = shape.spec, shape.layout, torch.Generator().manual_seed(0), Gate()
    blobs = _blobs(layout, min(spec.experts, PLACES * spec.top_k)).to(device)
    sketches = blobs[:, :layout.sketch_bytes].contiguous()
    records = blobs[:, layout.sketch_bytes:].reshape(-1, layout.record)
    x = torch.randn(1, layout.padded, generator=draw).to(device)
    codes, scales = quantize_activation(x, layout.group)
    weight = torch.full((1, spec.top_k), 1 / spec.top_k, device=device)
    histogram = torch.zeros(1, BINS, dtype=torch.int32, device=device)
    neurons = torch.randperm(spec.top_k * spec.neurons, generator=draw)[:refined + down_only].sort().values.int()[None]
    fidelity = torch.full_like(neurons, DOWN_ONLY, dtype=torch.int8)
    fidelity[0, torch.randperm(refined + down_only, generator=draw)[:refined]] = REFINED
    picks = [torch.randperm(len(blobs), generator=draw)[:spec.top_k].int()[None] for _ in range(PLACES)]
    where = [_record_places(place[0], neurons[0], layout.neurons)[None].to(device) for place in picks]
    places, chosen = [place.to(device) for place in picks], (neurons.to(device), fidelity.to(device))
    scored, applied, whole = cycle(places), cycle(zip(places, where, strict=True)), cycle(places)

    def sparse() -> torch.Tensor:
        place, record_place = next(applied)
        return apply(x, sketches, place, records, record_place, *chosen, layout, gate)
    return {"score": lambda: score(codes, scales, sketches, next(scored), weight, layout, gate, histogram=histogram),
            "apply": sparse, "dense": lambda: dense(x, blobs, next(whole), layout, gate)}


def _blobs(layout: Layout, n: int) -> torch.Tensor:
    blobs, random = torch.empty(n, layout.blob_bytes, dtype=torch.uint8), Blobs(layout, 0.0, seed=0)
    for blob in blobs:
        random.fill(blob)
    return blobs


def _record_places(experts: torch.Tensor, neurons: torch.Tensor, n_neurons: int) -> torch.Tensor:
    """Records lie expert after expert: int32 [K] for neurons 0..k*I-1 of the routed experts [k]."""
    return experts[(neurons // n_neurons).long()] * n_neurons + neurons % n_neurons


def row_text(row: Row) -> str:
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in row.items())


def save(rows: list[Row], folder: Path) -> Path:
    """Append to <card>.csv with date, versions and the command."""
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    known = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "cuda": torch.version.cuda,
             "system": platform.platform(), "command": " ".join(["python -m engine", *sys.argv[1:]])}
    path = folder / f"{name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        for row in rows:
            csv.writer(file).writerow([f"{key}={value}" for key, value in (known | row).items()])
    return path
