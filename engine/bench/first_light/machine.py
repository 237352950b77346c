"""Step 0: which card, which versions, what the driver says of it, and whether every module of ours imports here."""
from __future__ import annotations

import os
import platform
import shutil
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
from engine.units import size

PACKAGES = ("triton", "transformers", "numpy", "safetensors", "tokenizers", "huggingface-hub", "pydantic", "jinja2",
            "nvidia-ml-py", "psutil", "pytest")
NEAR = 0.05     # share by which two counts of the card's memory may differ


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
