"""Cases for Triton's interpreter: what `python -m kernels` does on a card, every kernel once, and that it tells."""
from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

import kernels.trunk
from kernels import __main__ as self_check
from kernels.__main__ import agrees, cases, main
from kernels.select import select

NAMES = [function.__name__ for function, _ in cases()]
ON_DEVICE = [at for at, (function, _) in enumerate(cases()) if function.is_on_device]


@pytest.mark.parametrize("at", ON_DEVICE)
def test_a_kernel_agrees(at):
    function, given = list(cases())[at]
    assert agrees(function.on_gpu(), function, given, "cpu"), function.__name__


def test_every_function_that_has_a_twin_is_checked():
    modules = [importlib.import_module(f"{package.__name__}.{found.name}") for package in (kernels, kernels.trunk)
               for found in pkgutil.iter_modules(package.__path__) if not found.ispkg and found.name != "__main__"]
    twins = {name for module in modules for name, value in vars(module).items() if hasattr(value, "on_gpu")}
    assert twins == {*NAMES, "token_step"}      # which the processor alone has, and no reference of its own


def test_a_kernel_that_is_wrong_is_found():
    given = next(given for function, given in cases() if function is select)

    def last_one_off(*args):
        neurons, fidelity = select.on_gpu()(*args)
        return torch.where(neurons == neurons.max(), neurons - 1, neurons), fidelity
    assert not agrees(last_one_off, select, given, "cpu")


def test_the_command_says_which_one_and_fails(monkeypatch, capsys):
    assert main() == 0 and "the kernels work" in capsys.readouterr().out
    monkeypatch.setattr(self_check, "agrees", lambda run, function, given, device: function is not select)
    assert main() == 3 and "wrong numbers from select." in capsys.readouterr().out
