"""The card decides the build of torch: a fake nvidia-smi on the path answers, and the pins that would be installed are
recorded, not downloaded."""
from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from installer import bootstrap, environment, gpu
from installer.screen import Screen, Trouble

PINS = Path(__file__).resolve().parents[2] / "installer" / "pins"
NO_FLAGS = argparse.Namespace(cpu=False, repair=False, offline=False)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the fake nvidia-smi is a shell script")


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Put an nvidia-smi that runs these shell lines first, and nothing else that could be one, on the path."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def answers(script: str) -> None:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    return answers


@pytest.fixture
def recorded(tmp_path, monkeypatch) -> list[environment.Recipe]:
    """What would have been built."""
    recipes = []

    def build(app, recipe, screen, finish):
        recipes.append(recipe)
        raise Trouble("recorded")
    monkeypatch.setattr(environment, "build", build)
    return recipes


def start(tmp_path) -> str:
    """The launcher up to the building of the environment; what it said."""
    screen = Screen(tmp_path / "log")
    with pytest.raises(Trouble, match="recorded"):
        bootstrap._environment(NO_FLAGS, tmp_path, screen)
    return (tmp_path / "log").read_text(encoding="utf-8")


@pytest.mark.parametrize("line, backend, said", [
    ("6.1, 580.65.06, 11264, NVIDIA GeForce GTX 1080 Ti", "cpu", "too old"),
    ("7.5, 581.20, 11264, NVIDIA GeForce RTX 2080 Ti", "cu130", "RTX 2080 Ti"),
    ("7.5, 550.120, 11264, NVIDIA GeForce RTX 2080 Ti", "cu126", "580"),
    ("8.6, 580.95.05, 12288, NVIDIA GeForce RTX 3060", "cu130", "RTX 3060"),
    ("8.6, 535.183.01, 12288, NVIDIA GeForce RTX 3060", "cu126", "580"),
    ("8.6, 470.256.02, 12288, NVIDIA GeForce RTX 3060", "cpu", "newer driver"),
    ("12.0, 580.95.05, 16303, NVIDIA GeForce RTX 5070 Ti", "cu130", "RTX 5070 Ti"),
    ("12.0, 572.16, 16303, NVIDIA GeForce RTX 5070 Ti", "cpu", "newer driver"),
    ("12.1, 580.95.05, [N/A], NVIDIA GB10", "cu130", "GB10"),
    ("6.1, 580.65, 8192, NVIDIA GeForce GTX 1080\n8.6, 580.65, 12288, NVIDIA GeForce RTX 3060", "cu130", "RTX 3060"),
    ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "cpu", "makes no sense"),
    ("\\xff\\x00 8.6; 12, GB", "cpu", "makes no sense"),
    ("", "cpu", "makes no sense"),
])
def test_the_card_chooses_the_pins(card, recorded, tmp_path, line, backend, said):
    card(f"printf '%b\\n' \"{line}\"")
    assert said in start(tmp_path)
    (recipe,) = recorded
    assert recipe.torch == environment.torch_pins(PINS, backend)
    assert recipe.locks == (PINS / "requirements.lock",)


def test_no_card(card, recorded, tmp_path):
    assert "No NVIDIA graphics card" in start(tmp_path)
    assert recorded[0].torch.name == "torch-cpu.txt"


def test_an_error_code_is_no_card(card, recorded, tmp_path):
    card('echo "8.6, 580.95, 12288, NVIDIA GeForce RTX 3060"; exit 9')
    start(tmp_path)
    assert recorded[0].torch.name == "torch-cpu.txt"


def test_a_hanging_driver_is_not_waited_for(card, recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE_SECONDS", 0.5)
    card("exec sleep 60")
    began = time.monotonic()
    assert "hangs" in start(tmp_path)
    assert time.monotonic() - began < 30
    assert recorded[0].torch.name == "torch-cpu.txt"


def test_the_card_is_asked_once(card, recorded, tmp_path):
    card(f'echo asked >> "{tmp_path}/asked"; echo "8.6, 580.95, 12288, NVIDIA GeForce RTX 3060"')
    for _ in range(2):
        start(tmp_path)
    assert (tmp_path / "asked").read_text() == "asked\n"
    with pytest.raises(Trouble):
        bootstrap._environment(argparse.Namespace(cpu=False, repair=True, offline=False), tmp_path,
                               Screen(tmp_path / "log"))
    assert (tmp_path / "asked").read_text() == "asked\nasked\n"
    (tmp_path / "bin" / "nvidia-smi").unlink()
    start(tmp_path)
    assert [recipe.name for recipe in recorded] == ["cu130", "cu130", "cu130", "cpu"]


def test_the_processor_on_request(card, recorded, tmp_path):
    card('echo "8.6, 580.95, 12288, NVIDIA GeForce RTX 3060"')
    with pytest.raises(Trouble):
        bootstrap._environment(argparse.Namespace(cpu=True, repair=False, offline=False), tmp_path,
                               Screen(tmp_path / "log"))
    assert recorded[0].name == "cpu"


@pytest.mark.parametrize("lock", ["requirements.lock", "tests.lock", "compiler.lock", "uv.lock", "torch.lock"])
def test_locks_pin_by_hash_and_name_no_place(lock):
    text = (PINS / lock).read_text(encoding="utf-8")
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    for block in re.split(r"\n(?=\w)", text.replace("\\\n", "")):
        name = block.split("==")[0]
        assert "==" in block and "--hash=sha256:" in block, f"{lock}: {name} has no hash"
        of_card = name == "torch" or name.startswith(("nvidia-cu", "cuda-"))
        assert not of_card or lock == "torch.lock", f"{lock}: {name} depends on the card"


@pytest.mark.parametrize("platform, backend, name", [
    ("linux", "cu130", "torch.lock"), ("darwin", "cpu", "torch.lock"), ("linux", "cpu", "torch-cpu.txt"),
    ("linux", "cu126", "torch-cu126.txt"), ("win32", "cpu", "torch-cpu.txt"), ("win32", "cu130", "torch-cu130.txt")])
def test_the_index_own_build_is_pinned_by_hash(monkeypatch, platform, backend, name):
    """The others are on PyTorch's index alone."""
    monkeypatch.setattr(environment.sys, "platform", platform)
    assert environment.torch_pins(PINS, backend) == PINS / name
    version = (PINS / "torch.txt").read_text(encoding="utf-8").strip()
    assert f"\n{version} \\\n    --hash=sha256:" in (PINS / "torch.lock").read_text(encoding="utf-8")


@pytest.mark.parametrize("backend", ["cpu", "cu126", "cu130"])
def test_torch_is_pinned_by_card(backend):
    lines = (PINS / f"torch-{backend}.txt").read_text(encoding="utf-8").splitlines()
    version = (PINS / "torch.txt").read_text(encoding="utf-8").strip()
    assert f"--extra-index-url https://download.pytorch.org/whl/{backend}" in lines
    assert not any(line.startswith("--index-url") for line in lines), "it would override pip's own settings"
    pinned = [line for line in lines if line.startswith("torch=")]
    assert pinned and all(line.replace("===", "==").startswith(version) for line in pinned)
    wanted = [Requirement(line) for line in lines if line and not line.startswith(("#", "--"))]
    for platform in ("linux", "win32"):
        taken = {one.name: str(one.specifier) for one in wanted
                 if one.marker is None or one.marker.evaluate({"sys_platform": platform})}
        on_windows, on_card = platform == "win32", backend != "cpu"
        assert set(taken) == {"torch"} | ({"triton-windows"} if on_windows and on_card else set())
        assert taken["torch"].endswith(f"+{backend}")
