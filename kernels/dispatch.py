"""Which version of a function runs: Triton's for CUDA tensors, the compiled one or plain torch for CPU tensors.

Triton is imported at the first CUDA call, and numba, which compiles for the processor, at the first CPU call: a machine
without either still has every reference. What numba compiles it keeps in NUMBA_CACHE_DIR; the first import of a module
of kernels/cpu takes seconds, later ones do not.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from types import ModuleType

import torch

_compiled_modules: set[str] = set()
_refusals: list[str] = []


def twin(on_device: str | None, compiled: str | None = None) -> Callable[[Callable], Callable]:
    """Decorate a reference whose Triton version has the same name and signature in `on_device`, and its compiled one
    in `compiled`, where it may return NotImplemented for what it leaves to the reference; None: there is none.

    The reference itself stays at hand as `.reference`, Triton's version as `.on_gpu()`; `.is_compiled` and
    `.is_on_device`: whether there are such.
    """
    if compiled:
        _compiled_modules.add(compiled)

    def decorate(reference: Callable) -> Callable:
        name = reference.__name__

        @wraps(reference)
        def pick(*args, **kwargs):
            if on_device and _on_device(args):
                return pick.on_gpu()(*args, **kwargs)
            module = compiled and _import(compiled)
            found = getattr(module, name)(*args, **kwargs) if module else NotImplemented
            return reference(*args, **kwargs) if found is NotImplemented else found
        pick.reference, pick.is_compiled, pick.is_on_device = reference, compiled is not None, on_device is not None
        pick.on_gpu = lambda: getattr(import_module(on_device), name)
        return pick
    return decorate


def compile_all() -> str:
    """Compile, or load, every function for this processor, so that no later call waits for it. -> "", or a sentence
    that says why the references run instead."""
    for name in sorted(_compiled_modules):
        _import(name)
    return why_not_compiled()


def why_not_compiled() -> str:
    """"" as long as no compiled function was refused, else why, in a sentence."""
    if not _refusals:
        return ""
    return (f"The fast functions for processors cannot be used ({_refusals[0]}), so everything computed here is many "
            "times slower; start the launcher with --repair, or install numba.")


@cache
def _import(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except Exception as error:      # not installed, refused by a version of numpy, by LLVM, by a disk: many kinds
        _refusals.append(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
        return None


def _on_device(values: tuple) -> bool:
    """Whether CUDA tensors are among them, or in tuples among them (a Pool); far memory is a page-locked CPU tensor and
    decides nothing. One loop: it runs some thirty times a layer."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.is_cuda:
                return True
        elif isinstance(value, tuple) and _on_device(value):
            return True
    return False
