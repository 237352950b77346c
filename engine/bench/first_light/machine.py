"""Steps 0 and 1: which card, which versions, whether every module of ours imports here; the kernels' own self-check,
and whether a kernel reads page-locked memory, beyond 4 GB into it as well."""
from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pkgutil import walk_packages

import torch

import kernels
from engine.bench.first_light.findings import Finding
from engine.bench.first_light.process import ROOT
from engine.bench.rows import Row
from engine.machine import detect, errors
from engine.machine.pinned_memory import CudaDriver, Driver, HostMemory
from engine.units import size
from kernels import __main__ as self_check
from kernels.fill import fill

PACKAGES = ("triton", "transformers", "numpy", "safetensors", "tokenizers", "huggingface-hub", "pydantic", "jinja2",
            "nvidia-ml-py", "psutil", "pytest")
NEAR = 0.05     # share by which two counts of the card's memory may differ
RECORD = 2304           # bytes; of Qwen3.6
N_READ = 4000           # records
SIZES = (256 << 20, (4 << 30) + (256 << 20))


def machine() -> Iterator[Row]:
    """MachineError, one sentence, where no card can be used."""
    errors.check()
    found = detect.survey()
    about, memory = torch.cuda.get_device_properties(0), found.gpu
    yield {"measured": "machine", "gpu": about.name, "torch": torch.__version__, "cuda": torch.version.cuda,
           "capability": f"{about.major}.{about.minor}", "multiprocessors": about.multi_processor_count,
           "driver": memory.driver if memory else "", "python": platform.python_version(),
           "compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"), **versions()}
    yield {"measured": "memory", "ram_bytes": found.ram_total_bytes, "ram_free_bytes": found.ram_free_bytes,
           "vram_bytes": about.total_memory, "vram_free_bytes": torch.cuda.mem_get_info()[0],
           "may_be_locked_bytes": found.pinned_limit_bytes, "processors": os.cpu_count()}
    yield from same_card(found, about.name, about.total_memory)
    yield from imports()


def versions() -> Row:
    """None for a package that is not there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def same_card(found: detect.Hardware, name: str, total_bytes: int) -> Iterator[Row]:
    """The card that the plan is made for is the one that torch will use."""
    gpu = found.gpu
    if gpu is None:
        yield Finding("the driver names the card", False, note=" ".join(found.notes)).row()
        return
    same = gpu.name == name and abs(gpu.vram_total_bytes - total_bytes) <= NEAR * total_bytes
    yield Finding("the driver and torch mean the same card", same,
                  note=f"{gpu.name}, {size(gpu.vram_total_bytes)}; {name}, {size(total_bytes)}").row()
    yield Finding("link by the driver's numbers", gpu.link_bytes_per_second > 0, gpu.link_bytes_per_second / 1e9,
                  "GB/s", note=f"PCIe {gpu.pcie_generation_max} x{gpu.pcie_width_max}").row()


def imports() -> Iterator[Row]:
    """A module that does not import breaks whatever needs it: better all at once than one by one."""
    names, broken = _modules(), 0
    for name in names:
        try:
            import_module(name)
        except Exception as error:  # whatever a package that is missing or too old raises
            broken += 1
            yield Finding("imports", False, case=name, note=f"{type(error).__name__}: {error}"[:300]).row()
    if not broken:
        yield Finding("every module imports", True, float(len(names)), "modules").row()


def _modules() -> list[str]:
    """Of engine/ and kernels/, but for what runs when it is imported."""
    found = [entry.name for package, path in (("engine", ROOT / "engine"), ("kernels", kernels.__path__[0]))
             for entry in walk_packages([str(path)], f"{package}.", onerror=lambda name: None)]
    return [name for name in found if not name.endswith("__main__")]


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
        yield Finding("memory is page-locked", not memory.reason, time.perf_counter() - start, "s", case=case,
                      note=memory.reason).row()
        if not memory.reason:
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
