"""Every way in which a card cannot be used has its sentence, and says what to do."""
from __future__ import annotations

import pytest
import torch

from engine.core import MachineError
from engine.machine import errors
from engine.machine.errors import Facts, in_words, obstacle

GOOD = dict(name="RTX 3060", capability=(8, 6), architectures=("sm_75", "sm_80", "sm_86", "sm_90", "compute_90"))
OLD_DRIVER = ("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
              "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx")
NO_DRIVER = ("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver "
             "from http://www.nvidia.com/Download/index.aspx")


@pytest.mark.parametrize("seen, words", [
    (Facts(built_for_cuda=False), ["without CUDA", "choose the processor"]),
    (Facts(started=OLD_DRIVER), ["driver is too old", "580", "update it"]),
    (Facts(started=NO_DRIVER), ["no NVIDIA driver", "install it"]),
    (Facts(started="No CUDA GPUs are available"), ["finds no graphics card", "CUDA_VISIBLE_DEVICES"]),
    (Facts(started="CUDA unknown error - this may be due to an incorrectly set up environment"), ["cannot start"]),
    (Facts(name="GTX 1080", capability=(6, 1), architectures=("sm_61",)), ["GTX 1080", "6.1", "7.5"]),
    (Facts(name="RTX 6090", capability=(13, 0), architectures=("sm_75", "sm_120")), ["RTX 6090", "driver", "again"]),
    (Facts(**GOOD, triton=False), ["pip install triton"]),
    (Facts(**GOOD, compiler=False), ["no C compiler", "apt install gcc", "ziglang"]),
    (Facts(**GOOD, headers=False), ["Python.h", "python3-dev"]),
])
def test_what_stands_in_the_way(seen, words):
    sentence = obstacle(seen)
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_nothing_stands_in_the_way_of_a_good_card(capability):
    assert obstacle(Facts(**GOOD | {"capability": capability})) == ""
    assert obstacle(Facts(**GOOD, compiler=None, headers=None)) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this computer has a card")
def test_this_computer_has_none():
    with pytest.raises(MachineError) as caught:
        errors.check()
    assert str(caught.value).endswith(".") and "processor" in str(caught.value)


def test_errors_in_the_middle():
    full = in_words(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
                    "Video memory: 9.8 GB of 11.2 GB free: trunk 1.0 GB, experts 8.2 GB.")
    assert full.startswith("The graphics card ran out of memory") and full.endswith("experts 8.2 GB.")
    lost = in_words(RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ..."))
    assert "stopped in the middle" in lost and "(unspecified launch failure)" in lost and "kept" in lost
    assert "reports an error" in in_words(torch.AcceleratorError("CUDA error: invalid argument"))
    missing = in_words(RuntimeError("Failed to find C compiler. Please specify via CC environment variable"))
    assert "no C compiler" in missing
    assert "Python.h" in in_words(RuntimeError("fatal error: Python.h: No such file or directory"))
    for other in (RuntimeError("shapes do not match"), ValueError("x"), KeyError()):
        assert in_words(other) is None


WHY = "The GTX 1080 has compute capability 6.1."


@pytest.mark.parametrize("wish, available, why, expected", [
    (None, True, "", ("cuda", "")), (None, True, WHY, ("cpu", WHY)), (None, False, WHY, ("cpu", "")),
    ("cpu", True, "", ("cpu", "")), ("cuda", True, "", ("cuda", "")), ("cuda", False, WHY, MachineError)])
def test_without_a_wish_a_card_is_taken_where_it_works(wish, available, why, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(errors, "facts", Facts)
    monkeypatch.setattr(errors, "obstacle", lambda seen: why)
    if expected is MachineError:
        with pytest.raises(MachineError, match="GTX 1080"):
            errors.device_for(wish)
    else:
        assert errors.device_for(wish) == expected


def test_why_a_card_is_left_alone_is_shown(monkeypatch, repository):
    from engine.chat.engine import Engine
    from engine.core import Options
    from engine.model import load
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(errors, "obstacle", lambda seen: WHY)
    with Engine(load.load(repository / "assets" / "demo", Options(level="exact")), Options()) as engine:
        assert (engine.snapshot()["device"], engine.snapshot()["note"]) == ("cpu", WHY)
