"""What this processor can do, as LLVM sees it, and where compiled code is kept between two starts.

Imported before anything here is compiled. `NUMBA_CPU_NAME=haswell` is honoured in full: numba alone would take the
name for scheduling only and go on using all instructions of this computer.
"""
from __future__ import annotations

import hashlib
from pathlib import Path

import llvmlite.binding as llvm
from numba import config

# Features of processors that somebody may ask for by name; any other name gets plain vectors.
NAMED = {"haswell": {"avx2", "fma", "f16c"}, "skylake-avx512": {"avx2", "fma", "f16c", "avx512bw", "avx512vl"}}


def features() -> frozenset[str]:
    """Instruction sets that compiled code may use, by LLVM's names."""
    if config.CPU_NAME and config.CPU_NAME != llvm.get_host_cpu_name():
        return frozenset(NAMED.get(config.CPU_NAME, ()))
    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


def version_of(folder: Path) -> str:
    """Of the sources there. numba asks only whether a function's own file has changed, not what else it was compiled
    from, so every version of this package keeps its code in a folder of its own."""
    sources = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:16]


if config.CPU_NAME and config.CPU_FEATURES is None and config.CPU_NAME != llvm.get_host_cpu_name():
    config.CPU_FEATURES = ""    # those that LLVM knows of this name
_HERE = Path(__file__).parent
config.CACHE_DIR = str(Path(config.CACHE_DIR or _HERE / "__pycache__") / version_of(_HERE))
