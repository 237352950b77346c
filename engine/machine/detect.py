"""What this machine has: cards through NVML, memory and disk through psutil, and why a card is or is not used.

`survey()` looks; `machine()` turns what was seen into the one frozen Machine that the planner reads. A missing driver,
a driver that errs or hangs, several cards, a card half used by another program, a card without memory of its own or too
old: each leaves a sentence in `notes`, none stops the program. Speeds are measured elsewhere
(engine.machine.benchmark); here they are only what the hardware's numbers allow. Loads no torch.
"""
from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import psutil

from engine.core import Machine, UserError
from engine.machine import nvml
from engine.machine.table import (
    FLOPS_PER_BYTE,
    GIB,
    LANE_BYTES_PER_SECOND,
    MIN_CAPABILITY,
    REACHED_BANDWIDTH,
    capability_of,
    rows,
)

SENTENCES = {
    "missing_package": "The nvidia-ml-py package is missing, so no graphics card can be looked for; install it with "
                       "pip install nvidia-ml-py.",
    "no_driver": "There is no NVIDIA driver on this computer; the processor is used.",
    "not_loaded": "The NVIDIA driver is installed but not running; the processor is used. A restart usually puts it "
                  "right.",
    "mismatch": "The NVIDIA driver was updated and the old one is still running; restart the computer to use the card.",
    "hangs": "The NVIDIA driver does not answer; the processor is used. Restarting the computer usually puts it right.",
}


@dataclass(frozen=True)
class Gpu:
    """One card as the driver describes it. vram_total 0: it has no memory of its own, or does not say. index:
    NVML's."""

    name: str
    compute_capability: str
    vram_total_bytes: int
    vram_free_bytes: int
    pcie_generation: int
    pcie_width: int
    pcie_generation_max: int
    pcie_width_max: int
    driver: str
    memory_bytes_per_second: float = 0.0
    index: int = 0
    uuid: str = ""

    @property
    def usable(self) -> bool:
        return self.vram_total_bytes > 0 and capability_of(self.compute_capability) >= MIN_CAPABILITY

    @property
    def link_bytes_per_second(self) -> float:
        """From the best link that card and slot agree on: an idle card shows a slower one to save power."""
        generation = max(self.pcie_generation, self.pcie_generation_max)
        width = max(self.pcie_width, self.pcie_width_max)
        return LANE_BYTES_PER_SECOND.get(min(generation, 6), 0.0) * width


@dataclass(frozen=True)
class Hardware:
    """What `survey` found, in bytes, and the sentences that explain it."""

    gpus: tuple[Gpu, ...]
    ram_total_bytes: int
    ram_free_bytes: int
    disk_free_bytes: int
    pinned_limit_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def gpu(self) -> Gpu | None:
        """The card to use: of the usable ones that with the most free memory, then the fastest."""
        usable = [g for g in self.gpus if g.usable]
        return max(usable, key=lambda g: (g.vram_free_bytes, g.memory_bytes_per_second), default=None)

    def document(self, copy_bytes_per_second: float) -> dict:
        """The JSON of `hardware --json`."""
        own = ("memory_bytes_per_second", "index", "uuid")
        gpus = [{k: v for k, v in asdict(g).items() if k not in own} for g in self.gpus]
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_bytes")}
        return {"gpus": gpus, **sizes, "copy_bytes_per_second": copy_bytes_per_second}


def survey(models_folder: str | os.PathLike | None = None, timeout: float = nvml.TIMEOUT_SECONDS,
           own_bytes: int = 0, own_vram_bytes: int = 0) -> Hardware:
    """Look at this machine. models_folder: where the free disk space is measured (default: the home folder). own_*:
    what this process holds, which counts as free."""
    answer = nvml.ask(timeout)
    gpus, notes = _cards(answer)
    if gpus and not (gpus := visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))):
        notes.append("CUDA_VISIBLE_DEVICES names no card of this computer; the processor is used.")
    if len(gpus) == 1:
        gpus = [replace(gpus[0], vram_free_bytes=min(gpus[0].vram_free_bytes + own_vram_bytes,
                                                     gpus[0].vram_total_bytes))]
    total, free = _memory()
    free = min(free + own_bytes, total)
    limit, why = _pinned_limit(total)
    found = Hardware(tuple(gpus), total, free, _disk_free(models_folder or Path.home()), limit)
    return replace(found, notes=tuple(notes + _about_choice(found) + ([why] if why and found.gpu else [])))


def visible(gpus: list[Gpu], wish: str | None) -> list[Gpu]:
    """The card that CUDA takes for a CUDA_VISIBLE_DEVICES of `wish`: the first that it names, by the driver's number or
    the beginning of its UUID. All without a wish."""
    if wish is None:
        return gpus
    first = wish.partition(",")[0].strip()
    named = (g for g in gpus if (str(g.index) == first if first.isdigit() else first and g.uuid.startswith(first)))
    return [*named][:1]


def choose_card(found: Hardware) -> None:
    """Let CUDA take the card that is planned for: of several it would take the first by an order of its own. For this
    process and its children; too late once CUDA has started."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as the driver counts them
    if found.gpu and found.gpu.uuid and len(found.gpus) > 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", found.gpu.uuid)


def without_cards(folder: str | os.PathLike) -> Hardware:
    """Memory and disk alone, for a model that runs on the CPU whatever cards there are; asks no driver."""
    total, free = _memory()
    return Hardware((), total, free, _disk_free(folder), 0)


def _cards(answer: dict) -> tuple[list[Gpu], list[str]]:
    gpus, notes = [], []
    error = answer["error"]
    if error:
        notes.append(SENTENCES.get(error, f"The NVIDIA driver reports an error ({error}); the processor is used."))
    elif not answer["gpus"]:
        notes.append("The NVIDIA driver runs but finds no card; the processor is used.")
    for number, card in enumerate(answer["gpus"]):
        if "error" in card:
            notes.append(f"Card {number} does not answer ({card['error']}); it is not used.")
        else:
            gpus.append(Gpu(driver=answer["driver"], index=number, **card))
    return gpus, notes


def _about_choice(found: Hardware) -> list[str]:
    """Sentences about cards that cannot be used, the choice among several, and a card half used by others."""
    notes = []
    for gpu in found.gpus:
        if not gpu.vram_total_bytes:
            notes.append(f"{gpu.name} has no memory of its own that the driver can report (an integrated card?); "
                         "it is not used.")
        elif not gpu.usable:
            notes.append(f"{gpu.name} has compute capability {gpu.compute_capability or 'unknown'}; "
                         "7.5 (RTX 20, GTX 16) or newer is needed, so it is not used.")
    chosen = found.gpu
    if chosen and sum(g.usable for g in found.gpus) > 1:
        notes.append(f"There are {len(found.gpus)} cards; {chosen.name} is used, it has the most free memory. "
                     "Set CUDA_VISIBLE_DEVICES to choose another.")
    if chosen and chosen.vram_total_bytes - chosen.vram_free_bytes > max(1.5 * GIB, chosen.vram_total_bytes / 5):
        used = (chosen.vram_total_bytes - chosen.vram_free_bytes) / 1e9
        notes.append(f"Other programs use {used:.1f} GB of {chosen.name}'s {chosen.vram_total_bytes / 1e9:.1f} GB; "
                     "closing them makes answers faster.")
    return notes


def _memory() -> tuple[int, int]:
    """RAM in total and available, in bytes; a container's limit counts."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit_file, used_file in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
                                  ("/sys/fs/cgroup/memory/memory.limit_in_bytes",
                                   "/sys/fs/cgroup/memory/memory.usage_in_bytes")):
        try:
            limit, used = int(Path(limit_file).read_text()), int(Path(used_file).read_text())
        except (OSError, ValueError):      # no container, or the limit is the word "max"
            continue
        if limit < total:
            total, free = limit, min(free, max(0, limit - used))
    return total, free


def _pinned_limit(total: int) -> tuple[int, str]:
    """Bytes that a CUDA program may page-lock, and why it is less than everything.

    The driver locks pages itself: the shell's `ulimit -l` does not count. Windows and its Linux subsystem allow half
    of the memory. What is really granted is seen when the memory is locked.
    """
    if sys.platform == "win32" or "microsoft" in platform.release().lower():
        return total // 2, "Windows lets programs page-lock at most half of the memory."
    return max(0, total - 2 * GIB), ""


def _disk_free(folder: str | os.PathLike) -> int:
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return psutil.disk_usage(str(path)).free


# --- Machine --------------------------------------------------------------------------------------------------
def machine(found: Hardware, device: str | None = None) -> Machine:
    """This machine for the planner; speeds that only a measurement knows stay 0. device None: the card if usable."""
    gpu = found.gpu if device != "cpu" else None
    if device == "cuda" and gpu is None:
        raise UserError("There is no usable graphics card: " + " ".join(found.notes))
    common = {"ram_total_bytes": found.ram_total_bytes, "ram_free_bytes": found.ram_free_bytes,
              "disk_free_bytes": found.disk_free_bytes, "pinned_limit_bytes": found.pinned_limit_bytes}
    if gpu is None:
        return Machine(name=processor_name(), **common)
    printed, flops = _printed_speeds(gpu)
    return Machine(name=gpu.name, device="cuda", vram_total_bytes=gpu.vram_total_bytes,
                   vram_free_bytes=gpu.vram_free_bytes, vram_bytes_per_second=REACHED_BANDWIDTH * printed,
                   link_bytes_per_second=gpu.link_bytes_per_second or LANE_BYTES_PER_SECOND[3] * 8,
                   compute_capability=gpu.compute_capability, flops_per_second=flops, **common)


def processor_name() -> str:
    """What a person calls it: on Linux Python only knows the kind ("x86_64"), the system the name."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine() or "this computer"


def _printed_speeds(gpu: Gpu) -> tuple[float, float]:
    """Memory bandwidth and 16-bit operations per second: the table's, else what the driver's clocks say."""
    for row in rows().values():
        same_size = abs(row.get("vram_gib", 0) * GIB - gpu.vram_total_bytes) < GIB
        if same_size and row["name"].lower() == gpu.name.lower().removeprefix("nvidia "):
            return row["memory_gb_per_second"] * 1e9, row["tflops"] * 1e12
    bandwidth = gpu.memory_bytes_per_second or 250e9
    return bandwidth, FLOPS_PER_BYTE * bandwidth


def machine_for(device: str, folder: Path) -> Machine:
    """This machine for a model on `device` ("cpu" asks no driver). UserError without a usable card for "cuda"."""
    found = survey(folder) if device == "cuda" else without_cards(folder)
    return machine(found, device)
