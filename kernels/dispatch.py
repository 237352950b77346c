"""Which of a function's two versions runs: plain torch for CPU tensors, Triton for CUDA tensors.

Triton is imported at the first CUDA call, so a machine without it still has every reference.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module

import torch


def twin(module: str) -> Callable[[Callable], Callable]:
    """Decorate a reference whose Triton version has the same name and signature in `module`.

    The reference itself stays at hand as `.reference`, the other one as `.on_gpu()`.
    """
    def decorate(reference: Callable) -> Callable:
        @wraps(reference)
        def pick(*args, **kwargs):
            if any(_on_device(value) for value in args):
                return pick.on_gpu()(*args, **kwargs)
            return reference(*args, **kwargs)
        pick.reference = reference
        pick.on_gpu = lambda: getattr(import_module(module), reference.__name__)
        return pick
    return decorate


def _on_device(value: object) -> bool:
    """CUDA tensors, and tuples of them (a Pool); far memory is a page-locked CPU tensor and decides nothing."""
    if isinstance(value, torch.Tensor):
        return value.is_cuda
    return isinstance(value, tuple) and any(_on_device(item) for item in value)
