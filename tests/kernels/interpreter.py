"""Triton's interpreter without two thirds of its work, none of which changes a result.

Imported where TRITON_INTERPRET=1, before a kernel runs. Two things cost the interpreter more than all else together:
every sum and product of integers is computed again in 64 bits for an assertion that only `debug` would make, and every
call of a device function patches the whole language anew although its kernel has just done that. Measured: a matrix of
160 x 192 at 4 bits times two tokens took 3.5 s of a processor, and takes 1.2 s.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from triton.runtime import interpreter

assert not interpreter.interpreter_builder.options.debug    # with it the assertions would be made
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

_patched: set[int] = set()          # language modules patched since the running kernel began
_run_grid, _patch = interpreter.GridExecutor.__call__, interpreter._patch_lang


def _grid(self, *arguments, **named):
    _patched.clear()
    return _run_grid(self, *arguments, **named)


def _device_function(self, *arguments, **named):
    """As InterpretedFunction.__call__, but what the languages of a module need is patched once a kernel."""
    if id(self.fn.__globals__) not in _patched:
        _patched.add(id(self.fn.__globals__))
        _patch(self.fn)
    return self.rewrite()(*arguments, **named)


interpreter.GridExecutor.__call__ = _grid
interpreter.InterpretedFunction.__call__ = _device_function


@contextmanager
def backwards() -> Iterator[None]:
    """Inside, the blocks of a launch run in the opposite order: what is left to the last of them must not tell."""
    builder = interpreter.interpreter_builder
    plain = builder.set_grid_idx

    def other_way(*place: int) -> None:
        plain(*(n - 1 - i for n, i in zip(builder.grid_dim, place, strict=True)))
    builder.set_grid_idx = other_way
    try:
        yield
    finally:
        del builder.set_grid_idx
