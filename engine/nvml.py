"""Asks the NVIDIA driver about its cards, in a process of its own that can be killed: a broken driver may never answer.

Run as a script it prints one JSON document {"driver", "error", "gpus"} and exits 0, whatever it found. `ask()` starts
it, waits a few seconds at most, and turns a hang or a crash into a sentence. Imports nothing of ours; `pynvml` is the
module of the nvidia-ml-py package.
"""
from __future__ import annotations

import json
import subprocess
import sys

TIMEOUT_SECONDS = 8.0


def _text(value) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _attempt(function, *arguments):
    """What NVML answers, or None where this card or driver cannot say."""
    import pynvml
    try:
        return function(*arguments)
    except (pynvml.NVMLError, AttributeError):
        return None


def _card(index: int) -> dict:
    import pynvml as n
    handle = n.nvmlDeviceGetHandleByIndex(index)
    memory = _attempt(n.nvmlDeviceGetMemoryInfo, handle)
    capability = _attempt(n.nvmlDeviceGetCudaComputeCapability, handle)
    clock = _attempt(n.nvmlDeviceGetMaxClockInfo, handle, n.NVML_CLOCK_MEM)
    bus = _attempt(getattr(n, "nvmlDeviceGetMemoryBusWidth", None) or (lambda _: None), handle)
    return {
        "name": _text(_attempt(n.nvmlDeviceGetName, handle) or "NVIDIA card"),
        "compute_capability": "{}.{}".format(*capability) if capability else "",
        "vram_total_bytes": memory.total if memory else 0,
        "vram_free_bytes": memory.free if memory else 0,
        "pcie_generation": _attempt(n.nvmlDeviceGetCurrPcieLinkGeneration, handle) or 0,
        "pcie_width": _attempt(n.nvmlDeviceGetCurrPcieLinkWidth, handle) or 0,
        "pcie_generation_max": _attempt(n.nvmlDeviceGetMaxPcieLinkGeneration, handle) or 0,
        "pcie_width_max": _attempt(n.nvmlDeviceGetMaxPcieLinkWidth, handle) or 0,
        # Two transfers a clock, as the driver counts the clock: 7,501 MHz x 192 bit = 360 GB/s on an RTX 3060.
        "memory_bytes_per_second": 2e6 * clock * bus / 8 if clock and bus else 0.0,
    }


def probe() -> dict:
    """What the driver says, in this process. May hang or crash with a broken driver: that is why `ask` exists."""
    document: dict = {"driver": "", "error": None, "gpus": []}
    try:
        import pynvml
    except ImportError:
        return document | {"error": "missing_package"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        kinds = {pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no_driver", pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "not_loaded",
                 getattr(pynvml, "NVML_ERROR_LIB_RM_VERSION_MISMATCH", 18): "mismatch"}
        return document | {"error": kinds.get(error.value, f"failed: {error}")}
    document["driver"] = _text(_attempt(pynvml.nvmlSystemGetDriverVersion) or "")
    for index in range(_attempt(pynvml.nvmlDeviceGetCount) or 0):
        try:
            document["gpus"].append(_card(index))
        except pynvml.NVMLError as error:
            document["gpus"].append({"error": str(error)})
    return document


def ask(timeout: float = TIMEOUT_SECONDS) -> dict:
    """`probe()` in a child that is killed after `timeout` seconds; a hang or a crash becomes `error`."""
    hidden = {"creationflags": subprocess.CREATE_NO_WINDOW} if sys.platform == "win32" else {}
    # -P: the script's folder must not shadow the standard library.
    child = subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, **hidden)
    try:
        out, _ = child.communicate(timeout=timeout)
        return json.loads(out)
    except subprocess.TimeoutExpired:
        child.kill()      # not waited for: a process stuck in the driver cannot even die
        return {"driver": "", "error": "hangs", "gpus": []}
    except ValueError:
        return {"driver": "", "error": f"crashed with exit code {child.returncode}", "gpus": []}


if __name__ == "__main__":
    print(json.dumps(probe()))
