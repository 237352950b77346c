"""Which build of torch this computer gets: decided by the cards' compute capability and the driver's version.

The driver alone is not enough: a GTX 1080 Ti with today's driver would get a build that has no code for it. The rules
follow PyTorch's support table for 2.13: CUDA 13.0 builds carry 7.5 to 12.x and need driver 580, CUDA 12.6 builds carry
up to 9.0 and need driver 528. Everything else gets the CPU build, and a sentence that says why.
"""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

QUERY = ["--query-gpu=compute_cap,driver_version,memory.total,name", "--format=csv,noheader,nounits"]
PATIENCE_SECONDS = 10  # a healthy nvidia-smi takes up to two; a broken driver makes it hang for ever
OLDEST = (7, 5)
LAST_OF_CUDA12 = (9, 0)


@dataclass(frozen=True)
class Card:
    """One line of nvidia-smi."""

    capability: tuple[int, int]
    driver: int  # the number before the first point
    memory_mib: int  # 0 where the card shares the computer's memory and names none
    name: str


@dataclass(frozen=True)
class Choice:
    """A torch build and the sentence that explains it. backend: cpu, cu126 or cu130."""

    backend: str
    sentence: str


def choose(force_cpu: bool = False) -> Choice:
    """Ask the computer and decide. Never raises: a computer that cannot answer gets the CPU build."""
    if force_cpu:
        return Choice("cpu", "Using the processor only, as you asked (--cpu).")
    if sys.platform == "darwin":
        return Choice("cpu", "Apple computers run Floe Chat on the processor only: good for a look, not for speed.")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Choice("cpu", "No NVIDIA graphics card found. Floe Chat runs on the processor, which is much slower.")
    try:
        asked = subprocess.Popen([tool, *QUERY], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 stdin=subprocess.DEVNULL, text=True, errors="replace")
        answer, _ = asked.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        asked.kill()  # and no waiting for its end: a process stuck in the driver cannot be killed
        return Choice("cpu", "The NVIDIA driver does not answer (nvidia-smi hangs). Using the processor; restart the "
                             "computer or install the driver again, then start with --repair.")
    except OSError as error:
        return Choice("cpu", f"nvidia-smi could not be run ({error.strerror}). Using the processor.")
    return decide(cards(answer) if asked.returncode == 0 else [])


def fingerprint() -> str:
    """Changes when a driver comes, goes or is updated; cheap enough for every start."""
    version = Path("/proc/driver/nvidia/version")
    return f"{shutil.which('nvidia-smi')} {version.read_text(errors='replace') if version.exists() else ''}"


def cards(text: str) -> list[Card]:
    """The lines of nvidia-smi that can be understood."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"\s*(\d+)\.(\d+)\s*,\s*(\d+)(?:\.\d+)*\s*,\s*([^,]*?)\s*,\s*(.+?)\s*", line)
        if match:
            major, minor, driver = (int(part) for part in match.groups()[:3])
            found.append(Card((major, minor), driver, int(match[4]) if match[4].isdigit() else 0, match[5]))
    return found


def decide(found: list[Card]) -> Choice:
    """The rule itself."""
    if not found:
        return Choice("cpu", "There is an nvidia-smi, but its answer makes no sense. Using the processor; install a "
                             "current NVIDIA driver and start with --repair.")
    card = max(found, key=lambda one: (one.capability, one.memory_mib))
    named = f"{card.name} (compute capability {card.capability[0]}.{card.capability[1]}, driver {card.driver})"
    if card.capability < OLDEST:
        return Choice("cpu", f"Your {named} is too old: Floe Chat needs compute capability 7.5 (GeForce GTX 16, RTX 20 "
                             "or later). Using the processor.")
    if card.driver >= 580:
        return Choice("cu130", f"Found {named}.")
    if card.driver >= 528 and card.capability <= LAST_OF_CUDA12:
        return Choice("cu126", f"Found {named}. A driver from 580 on would allow a newer build.")
    return Choice("cpu", f"Your {named} needs a newer driver: install version 580 or later and start again. Using the "
                         "processor until then.")
