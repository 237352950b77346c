"""NVIDIA's library as a stand-in built from tests/fake_nvml: cards, counters and faults as a test wishes."""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RTX_3060 = "NVIDIA GeForce RTX 3060|8.6|12288|11900|1|16|4|16|7501|192"


def build(folder: Path) -> Path:
    """A fake libnvidia-ml.so.1 in `folder`; skips the test where it cannot be built."""
    pytest.importorskip("pynvml", reason="needs the nvidia-ml-py package")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or not compiler:
        pytest.skip("needs Linux and a C compiler to build the stand-in for NVIDIA's library")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-D_GNU_SOURCE", "-o", str(folder / "libnvidia-ml.so.1"),
                    str(Path(__file__).parent / "fake_nvml" / "nvml.c")], check=True)
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def driver(library, monkeypatch):
    """Call it with cards, a fault and what the link's counter shows; surveys and meters then see them."""
    def set_up(*cards: str, fault: str = "", link: str | None = None) -> None:
        monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
        monkeypatch.setenv("FAKE_NVML_CARDS", ";".join(cards))
        monkeypatch.setenv("FAKE_NVML_FAULT", fault)
        monkeypatch.setenv("FAKE_NVML_LINK", link) if link else monkeypatch.delenv("FAKE_NVML_LINK", raising=False)
    return set_up
