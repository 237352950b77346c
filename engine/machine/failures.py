"""Any error in one plain sentence: ours as they are, a card's, and what every program may meet: no memory, no disk."""
from __future__ import annotations

import errno

from engine.core import MachineError, UserError
from engine.disk import FULL
from engine.machine import errors


def sentence(error: BaseException, planned: str = "") -> str:
    """For the user, about any error. planned: what the plan gave which part of a card's memory."""
    if words := in_words(error, planned):
        return words
    reason = str(error).strip().splitlines()
    return f"The model failed ({type(error).__name__}{': ' + reason[0] if reason else ''}); try again."


def in_words(error: BaseException, planned: str = "") -> str | None:
    """One sentence; None for an error that is nobody's fault but this program's."""
    if isinstance(error, (UserError, MachineError)):
        return str(error)
    if words := errors.in_words(error, planned):
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
