"""Step 1: the kernels' own self-check, and whether a kernel reads page-locked memory, beyond 4 GB into it as well."""
from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from engine.bench.first_light.findings import Finding
from engine.bench.rows import Row
from engine.machine.pinned_memory import CudaDriver, Driver, HostMemory
from engine.units import size
from kernels import __main__ as self_check
from kernels.fill import fill

RECORD = 2304           # bytes; of Qwen3.6
N_READ = 4000           # records
SIZES = (256 << 20, (4 << 30) + (256 << 20))


def locked() -> Iterator[Row]:
    start = time.perf_counter()
    works = self_check.main() == 0      # what it says goes to the log
    yield Finding("self-check", works, time.perf_counter() - start, "s").row()
    for n_bytes in SIZES:
        yield from read_back(n_bytes, CudaDriver())


def read_back(n_bytes: int, driver: Driver, device: str = "cuda", n_read: int = N_READ) -> Iterator[Row]:
    """Register so much, let the kernel fetch records from all of it, the last one included, and compare."""
    start, case = time.perf_counter(), size(n_bytes)
    memory = HostMemory(n_bytes, driver)
    try:
        yield Finding("memory is page-locked", not memory.sentence, time.perf_counter() - start, "s", case=case,
                      note=memory.sentence).row()
        if not memory.sentence:
            yield _fetched(memory.bytes, device, n_read, case)
    finally:
        memory.close()


def _fetched(memory: torch.Tensor, device: str, n_read: int, case: str) -> Row:
    far = memory[:len(memory) // RECORD * RECORD].view(1, -1, RECORD)
    draw = torch.Generator().manual_seed(0)
    source = torch.cat((torch.randperm(far.shape[1] - 1, generator=draw)[:n_read - 1],
                        torch.tensor([far.shape[1] - 1]))).int()
    expected = torch.randint(0, 256, (n_read, RECORD), dtype=torch.uint8, generator=draw)
    far[0, source.long()] = expected
    near = torch.zeros(n_read, RECORD, dtype=torch.uint8, device=device)
    place = torch.arange(n_read, dtype=torch.int32, device=device)
    fill(far, source.to(device), near, place, torch.zeros_like(place), torch.full_like(place, RECORD))
    wrong = (near.cpu() != expected).any(1)
    return Finding("a kernel reads page-locked memory", not bool(wrong.any()), float(wrong.sum()), "records differ",
                   case=case).row()
