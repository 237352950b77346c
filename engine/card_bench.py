"""What decides the design on a card, measured in this order: `fill`, nodes of a graph, the capture of a real step.

Each measurement yields rows (plain dictionaries) for tests/bench/<card>.csv. `fill` is held against the copy engine by
record size, burst, blocks and page-locked size; a graph's node is timed in chains of empty and of working kernels; a
step of a synthetic model is replayed against itself and its milliseconds are split by kernel. Needs a card.
"""
from __future__ import annotations

import csv
import datetime
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from engine.host_memory import CudaDriver, HostMemory
from kernels import triton_fill
from kernels.fill import fill

MIB = 2**20
RECORDS = (1152, 2304, 4608, 9216)              # bytes; multiples of 128
BURSTS = (10, 100, 450, 1000, 4000, 16000)      # records of one call
BLOCKS = (4, 8, 16, 32, 64, 128)
CHAIN = (100, 1000, 4000)
REPEATS = 20
Row = dict[str, object]


def milliseconds(run, repeats: int = REPEATS) -> float:
    """Median time of `run` on the card, after a first call that does not count."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def occupied(vram_bytes: int | None) -> torch.Tensor | None:
    """Take what the card has above `vram_bytes`, so that it is a smaller one for as long as the result lives."""
    if vram_bytes is None:
        return None
    spare = torch.cuda.mem_get_info()[1] - vram_bytes
    return torch.empty(max(0, spare), dtype=torch.uint8, device="cuda")


def fills(total_bytes: int) -> Iterator[Row]:
    """`fill` from page-locked memory of `total_bytes`, random records, against one copy of the same bytes."""
    memory = HostMemory(total_bytes, CudaDriver())
    if memory.sentence:
        yield {"measured": "fill", "total": total_bytes, "error": memory.sentence}
    locked = memory.bytes[:memory.locked_bytes]
    locked[::4096] = 1  # every page is there
    draw, before = torch.Generator().manual_seed(0), triton_fill.WARPS
    try:
        for record in RECORDS:
            far = locked[:len(locked) // record * record].view(1, -1, record)
            for burst in (n for n in BURSTS if n <= far.shape[1]):
                copied = milliseconds(_copy(locked, burst * record))
                for triton_fill.WARPS in BLOCKS:
                    took = milliseconds(_fill(far, burst, draw))
                    yield {"measured": "fill", "total": total_bytes, "record": record, "burst": burst,
                           "blocks": triton_fill.WARPS, "gb_per_second": burst * record / took / 1e6,
                           "of_copy_engine": copied / took}
    finally:
        triton_fill.WARPS = before
        memory.close()


def _copy(locked: torch.Tensor, n_bytes: int):
    target = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
    return lambda: target.copy_(locked[:n_bytes], non_blocking=True)


def _fill(far: torch.Tensor, burst: int, draw: torch.Generator):
    near = torch.empty(burst, far.shape[2], dtype=torch.uint8, device="cuda")
    source = torch.randint(far.shape[1], (burst,), generator=draw, dtype=torch.int32).cuda()
    place = torch.arange(burst, dtype=torch.int32, device="cuda")
    have, need = torch.zeros_like(place), torch.full_like(place, far.shape[2])
    return lambda: fill(far, source, near, place, have, need)


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
            if fork and i % 10 == 9:
                torch.cuda.current_stream().wait_stream(side)
        torch.cuda.current_stream().wait_stream(side)
    return graph


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
