"""How a process of ours begins, whatever the shell around it says."""
from __future__ import annotations

import os
import subprocess
import sys


def begin_process(module: str) -> None:
    """For a process of its own, before anything is imported: no library's progress bars nor its advice what else to
    install, UTF-8 in files and pipes, and once more without python -O, with which transformers does not work (it reads
    its own descriptions). torch asks for its memory in huge pages, where the system has them: two threads read weights
    out of pages of 4 KiB a fifth slower (NOTES, Processor)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' as well
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="replace")
    if sys.flags.optimize:
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.environ.pop("PYTHONOPTIMIZE", None)
        if sys.platform == "win32":
            sys.exit(subprocess.call(command))
        os.execv(sys.executable, command)
