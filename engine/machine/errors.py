"""What goes wrong, in one plain sentence: whether a graphics card can be used at all, and any error in mid-work.

`check` asks torch and the system about the card; `in_words` turns what CUDA, torch, Triton, memory or disk raise into
one sentence, or None where it is nobody's fault but this program's. Facts are gathered apart from what is made of them.
"""
from __future__ import annotations

import errno
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.core import MachineError, UserError
from engine.disk import FULL
from engine.machine.table import MIN_CAPABILITY

AGAIN = "start Floe Chat again, or choose the processor"
# Errors after which no further call of CUDA works in this process.
LOST = ("unspecified launch failure", "illegal memory access", "device-side assert", "gpu is lost", "device lost",
        "uncorrectable ecc", "launch timed out", "misaligned address", "illegal instruction", "fallen off the bus",
        "cudaerrordeviceunavailable", "unknown error")


@dataclass(frozen=True)
class Facts:
    """What was seen. started: what starting CUDA raised, "" for nothing. architectures: sm_NN that torch carries code
    for. compiler, headers: what Triton needs once to build its launcher (None: this system brings its own)."""

    built_for_cuda: bool = True
    started: str = ""
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    architectures: tuple[str, ...] = ()
    triton: bool = True
    compiler: bool | None = True
    headers: bool | None = True


def facts() -> Facts:
    """Starts CUDA, if it can be started."""
    built, started, name, capability, architectures = torch.backends.cuda.is_built(), "", "", (0, 0), ()
    if built:
        try:
            torch.cuda.init()
            name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
            architectures = tuple(torch.cuda.get_arch_list())
        except (RuntimeError, AssertionError) as error:
            started = str(error).strip() or type(error).__name__
    try:
        import triton  # noqa: F401
        with_triton = True
    except ImportError:
        with_triton = False
    linux = sys.platform.startswith("linux")
    compiler = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) if linux else None
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists() if linux else None
    return Facts(built, started, name, capability, architectures, with_triton, compiler, headers)


def obstacle(seen: Facts) -> str:
    """Why a card cannot be used, and what to do about it; "" when it can."""
    if not seen.built_for_cuda:
        return ("This PyTorch was built without CUDA, so no graphics card can be used; install Floe Chat again on a "
                "computer with an NVIDIA card, or choose the processor.")
    if seen.started:
        return _not_started(seen.started)
    if seen.capability < MIN_CAPABILITY:
        major, minor = seen.capability
        return (f"The {seen.name} has compute capability {major}.{minor}; 7.5 (RTX 20, GTX 16) or newer is needed. "
                "Choose the processor.")
    if seen.architectures and not any(_runs_on(text, seen.capability) for text in seen.architectures):
        return (f"This PyTorch carries no code for the {seen.name} (compute capability {seen.capability[0]}."
                f"{seen.capability[1]}); update the NVIDIA driver and install Floe Chat again.")
    if not seen.triton:
        return "Triton is missing, which the card's kernels are made with; install it with pip install triton."
    if seen.compiler is False:
        return ("There is no C compiler, which Triton needs once: install one (on Debian and Ubuntu: sudo apt install "
                "gcc), or pip install ziglang and set CC to a script that runs python -m ziglang cc.")
    if seen.headers is False:
        return ("Python.h is missing, which Triton needs once; install it (on Debian and Ubuntu: sudo apt install "
                "python3-dev).")
    return ""


def _not_started(reason: str) -> str:
    text = reason.lower()
    if "too old" in text or "insufficient" in text:
        return ("The NVIDIA driver is too old for this PyTorch; update it (580 or newer for CUDA 13, 525 or newer for "
                "CUDA 12), restart the computer, or choose the processor.")
    if "no nvidia driver" in text or "libcuda" in text:
        return "There is no NVIDIA driver on this computer; install it, or choose the processor."
    if "no cuda gpus" in text or "no cuda-capable device" in text:
        return ("The NVIDIA driver finds no graphics card; check CUDA_VISIBLE_DEVICES and the card, or choose the "
                "processor.")
    return f"CUDA cannot start ({reason.splitlines()[0]}); restart the computer, or choose the processor."


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """sm_86 runs on 8.6 and 8.9, not on 9.0; compute_90 is compiled by the driver for whatever is newer."""
    kind, _, digits = architecture.partition("_")
    digits = digits.rstrip("af")
    if not digits.isdigit():
        return False
    own = int(digits[:-1]), int(digits[-1])
    return own <= capability if kind == "compute" else own[0] == capability[0] and own <= capability


def check() -> None:
    """MachineError, one sentence, unless a card can be used."""
    if reason := obstacle(facts()):
        raise MachineError(reason)


def device_for(wish: str | None) -> tuple[str, str]:
    """cpu or cuda (without a wish, where it works), and the sentence why a card that is there is left alone, else "".

    MachineError for a card that is wished and cannot be used.
    """
    if wish == "cpu" or (wish is None and not torch.cuda.is_available()):
        return "cpu", ""
    why = obstacle(facts())
    if why and wish:
        raise MachineError(why)
    return ("cpu", why) if why else ("cuda", "")


def reason_for(error: BaseException, planned: str = "") -> str:
    """For the user, about any error. planned: what the plan gave which part of a card's memory."""
    first = str(error).strip().partition("\n")[0]
    return in_words(error, planned) or f"The model failed ({type(error).__name__}{first and ': ' + first}); try again."


def in_words(error: BaseException, planned: str = "") -> str | None:
    """One sentence; None for an error that is nobody's fault but this program's."""
    if isinstance(error, (UserError, MachineError)):
        return str(error)
    if words := _of_card(error, planned):
        return words
    if is_out_of_memory(error):
        return "The computer ran out of memory; close other programs or choose a smaller context, and try again."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FULL.format(where="")
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be used ({error.strerror}); check the disk and the rights of its folder."
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Of main memory; torch says so in a RuntimeError."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _of_card(error: BaseException, planned: str) -> str | None:
    """About an error of the card or of its compiler; None for any other."""
    text = str(error).strip()
    first, lower = (text.splitlines() or [type(error).__name__])[0], text.lower()
    if isinstance(error, torch.OutOfMemoryError) or "cuda_error_out_of_memory" in lower:
        sums = f" Planned was: {planned}" if planned else ""
        return ("The graphics card ran out of memory; close other programs that use it, choose less near memory or a "
                f"smaller context, and try again.{sums}")
    if "failed to find c compiler" in lower or "python.h" in lower:
        return obstacle(Facts(capability=MIN_CAPABILITY, compiler="python.h" in lower, headers=False))
    if isinstance(error, torch.AcceleratorError) or "cuda error" in lower or "cuda driver error" in lower:
        if any(word in lower for word in LOST):
            return (f"The graphics card stopped in the middle of its work ({_reason(first)}); what was written so far "
                    f"is kept. To go on, {AGAIN}.")
        return f"The graphics card reports an error ({_reason(first)}); {AGAIN}."
    return None


def _reason(line: str) -> str:
    return line.partition("CUDA error: ")[2] or line
