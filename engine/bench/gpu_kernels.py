"""What decides the design on a graphics card, without a model: bandwidths, `fill`, nodes of a graph.

`fill` is held against the copy engine by record size, burst, blocks, page-locked size and page size, alone and beside
another kernel; a graph's node is timed in chains of empty and of working kernels. Single kernels:
engine/bench/single_kernels.py. Whole steps: engine/bench/step.py.
"""
from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median

import torch

from engine.bench.rows import CardTable, Row
from engine.core import MachineError, UserError
from engine.machine.pinned_memory import CudaDriver, Driver, HostMemory
from engine.units import size
from kernels.fill import fill
from kernels.gpu import fill as gpu_fill

MIB = 2**20
CHAIN = (100, 1000, 4000)
REPEATS = 20
SLEEP_CYCLES = 10**7    # some milliseconds
VRAM_BYTES, LINK_BYTES = 256 * MIB, 64 * MIB    # several times the largest cache of a card
Run = Callable[[], object]
Time = Callable[[Run], float]   # milliseconds of a run


@dataclass(frozen=True)
class Speeds:
    """Bytes per second that a card reaches: of its own memory, and of a copy from page-locked memory."""

    vram: float
    link: float

    def __post_init__(self) -> None:
        assert self.vram > 0 and self.link > 0, self


@dataclass(frozen=True)
class FillCases:
    """records: bytes, multiples of 128. bursts: records of one call. blocks: of one warp each."""

    records: tuple[int, ...] = (1152, 2304, 4608, 9216)
    bursts: tuple[int, ...] = (10, 100, 450, 1000, 4000, 16000)
    blocks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)

    def __post_init__(self) -> None:
        assert self.records and self.bursts and self.blocks and not any(n % 128 for n in self.records), self


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


def fills(total_bytes: int, small_pages: bool = False, cases: FillCases | None = None, beside: Run | None = None,
          driver: Driver | None = None, device: str = "cuda", time: Time = milliseconds) -> Iterator[Row]:
    """`fill` from page-locked memory of `total_bytes`, random records, against one copy of the same bytes. beside: a
    kernel that runs meanwhile, if anything does."""
    memory = (SmallPages if small_pages else HostMemory)(total_bytes, driver or CudaDriver())
    cases = cases or FillCases()
    known = {"measured": "fill", "total": total_bytes, "pages": "small" if small_pages else "huge"}
    if memory.reason:
        yield known | {"sentence": memory.reason}
    locked = memory.bytes[:memory.locked_bytes]
    locked[::4096] = 1  # every page is there
    draw, before = torch.Generator().manual_seed(0), gpu_fill.WARPS
    alone = time(beside) if beside else 0.0
    try:
        for record in cases.records:
            far = locked[:len(locked) // record * record].view(1, -1, record)
            for burst in (n for n in cases.bursts if n <= far.shape[1]):
                copied = time(_copy(locked, burst * record, device))
                for gpu_fill.WARPS in cases.blocks:
                    run = _fill(far, burst, draw, device)
                    took = time(run)
                    yield known | {"record": record, "burst": burst, "blocks": gpu_fill.WARPS,
                                   "gb_per_second": burst * record / took / 1e6, "of_copy_engine": copied / took,
                                   **(_beside(run, beside, took, alone, time) if beside else {})}
    finally:
        gpu_fill.WARPS = before
        memory.close()


def _beside(run: Run, other: Run, took: float, alone: float, time: Time) -> Row:
    """overlap: 1 where both together take no longer than the longer of them, 0 where they take the sum."""
    side = torch.cuda.Stream() if torch.cuda.is_available() else None

    def both() -> None:
        if side is None:
            other()
            return run()
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            run()
        other()
        main.wait_stream(side)
    together = time(both)
    return {"beside_ms": together, "other_ms": alone, "overlap": (took + alone - together) / min(took, alone)}


def _copy(locked: torch.Tensor, n_bytes: int, device: str) -> Run:
    target = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    return lambda: target.copy_(locked[:n_bytes], non_blocking=True)


def _fill(far: torch.Tensor, burst: int, draw: torch.Generator, device: str) -> Run:
    """Other records every time: the tables of pages that were just read are at hand."""
    near = torch.empty(burst, far.shape[2], dtype=torch.uint8, device=device)
    sources = cycle([torch.randint(far.shape[1], (burst,), generator=draw, dtype=torch.int32).to(device)
                     for _ in range(REPEATS + 1)])
    place = torch.arange(burst, dtype=torch.int32, device=device)
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


def card_table(folder: Path) -> CardTable:
    """The table of this computer's card."""
    return CardTable(folder, torch.cuda.get_device_name(), {"torch": torch.__version__, "cuda": torch.version.cuda})
