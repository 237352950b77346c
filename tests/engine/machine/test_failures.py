"""Errors that no part of ours raised: a machine's are one sentence and exit code 3, our own keep their traceback."""
from __future__ import annotations

import errno

import pytest
import torch

from engine.__main__ import main
from engine.core import MachineError, UserError
from engine.library import catalogue
from engine.machine.errors import in_words, reason_for


def too_much() -> RuntimeError:
    """What torch itself raises when main memory is asked for an exabyte."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


MACHINES = [
    (MemoryError, "ran out of memory"),
    (too_much, "ran out of memory"),
    (lambda: torch.OutOfMemoryError("CUDA out of memory."), "graphics card ran out of memory"),
    (lambda: OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
    (lambda: PermissionError(errno.EACCES, "Permission denied", "/a/file"), "/a/file cannot be used"),
]


@pytest.mark.parametrize("made, words", MACHINES)
def test_a_machines_error_ends_a_verb_in_one_reason_for(made, words, monkeypatch, capfd):
    error = made()
    monkeypatch.setattr(catalogue, "look_up", lambda *_: (_ for _ in ()).throw(error))
    assert main(["plan", "demo", "--json"]) == 3
    out, err = capfd.readouterr()
    assert out == "" and words in err and err.count("\n") == 1 and err.endswith(".\n")
    assert reason_for(error) == err.strip()


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shapes"), KeyError("k"), OSError("odd")])
def test_a_mistake_of_ours_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(catalogue, "look_up", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)) as caught:
        main(["plan", "demo"])
    assert caught.value is error and in_words(error) is None
    assert reason_for(error).startswith("The model failed (") and reason_for(error).endswith("try again.")


def test_our_own_errors_are_their_own_reason_for():
    for error in (UserError("Do this."), MachineError("It broke.")):
        assert in_words(error) == reason_for(error) == str(error)
