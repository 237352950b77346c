"""Asks the NVIDIA driver about its cards, in a process of its own that can be killed: a broken driver may never answer.

Run as a script it prints one JSON document {"driver", "error", "gpus"} and exits 0, whatever it found. `ask()` starts
it, waits a few seconds at most, and turns a hang or a crash into a sentence. With `--watch INDEX` it prints a line of
that card's live numbers several times a second until its standard input ends. Imports nothing of ours; `pynvml` is the
module of the nvidia-ml-py package.
"""
from __future__ import annotations

import json
import subprocess
import sys
import threading

TIMEOUT_SECONDS = 8.0
EVERY_SECONDS = 0.25


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
        "uuid": _text(_attempt(n.nvmlDeviceGetUUID, handle) or ""),
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
        return document | {"error": _error_of(error)}
    document["driver"] = _text(_attempt(pynvml.nvmlSystemGetDriverVersion) or "")
    for index in range(_attempt(pynvml.nvmlDeviceGetCount) or 0):
        try:
            document["gpus"].append(_card(index))
        except pynvml.NVMLError as error:
            document["gpus"].append({"error": str(error)})
    return document


def _error_of(error) -> str:
    """What NVML's own number means, as `ask` and `watch` say it."""
    import pynvml
    kinds = {pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no_driver", pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "not_loaded",
             getattr(pynvml, "NVML_ERROR_LIB_RM_VERSION_MISMATCH", 18): "mismatch"}
    return kinds.get(error.value, f"failed: {error}")


def watch(index: int) -> None:
    """Lines {"to_card", "from_card" bytes per second, "vram_used_bytes", "vram_total_bytes", "busy" 0..1} of one card,
    None where it has no such counter; one line {"error"} instead where there is no card. Ends with standard input."""
    import pynvml as n
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    try:
        n.nvmlInit()
        handle = n.nvmlDeviceGetHandleByIndex(index)
    except n.NVMLError as error:
        print(json.dumps({"error": _error_of(error)}), flush=True)
        return
    while not ended.is_set():
        print(json.dumps(_live(n, handle)), flush=True)
        ended.wait(EVERY_SECONDS)


def _live(n, handle) -> dict:
    def crossed(counter: int) -> int | None:
        kilobytes = _attempt(n.nvmlDeviceGetPcieThroughput, handle, counter)  # over the last 20 ms
        return None if kilobytes is None else 1000 * kilobytes
    memory, use = _attempt(n.nvmlDeviceGetMemoryInfo, handle), _attempt(n.nvmlDeviceGetUtilizationRates, handle)
    return {"to_card": crossed(n.NVML_PCIE_UTIL_RX_BYTES), "from_card": crossed(n.NVML_PCIE_UTIL_TX_BYTES),
            "vram_used_bytes": memory.used if memory else None, "vram_total_bytes": memory.total if memory else None,
            "busy": use.gpu / 100 if use else None}


def ask(timeout: float = TIMEOUT_SECONDS) -> dict:
    """`probe()` in a child that is killed after `timeout` seconds; a hang or a crash becomes `error`."""
    child = start(stdin=subprocess.DEVNULL)
    try:
        out, _ = child.communicate(timeout=timeout)
        return json.loads(out)
    except subprocess.TimeoutExpired:
        child.kill()      # not waited for: a process stuck in the driver cannot even die
        return {"driver": "", "error": "hangs", "gpus": []}
    except ValueError:
        return {"driver": "", "error": f"crashed with exit code {child.returncode}", "gpus": []}


def start(*arguments: str, stdin: int) -> subprocess.Popen:
    """This file as a process of its own."""
    hidden = {"creationflags": subprocess.CREATE_NO_WINDOW} if sys.platform == "win32" else {}
    # -P: the script's folder must not shadow the standard library.
    return subprocess.Popen([sys.executable, "-P", __file__, *arguments], stdin=stdin, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, **hidden)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        watch(int(sys.argv[2]))
    else:
        print(json.dumps(probe()))
