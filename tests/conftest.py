"""Fixtures that several tests share."""
from __future__ import annotations

import signal
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Where the tests themselves run in the background, they and every program they start would ignore Ctrl+C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end no worker then has a long one while the others wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Texts and the trained checkpoint that the developers keep beside the repository."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "models" / "tiny-chat").is_dir():
        pytest.skip(f"needs the developers' data folder {folder}, which a plain clone does not have")
    return folder


@pytest.fixture(scope="session")
def demo_checkpoint(repository: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with the demonstration model's tokenizer and chat template."""
    embedded = repository / "assets" / "demo"
    if (embedded / "tokenizer.json").is_file():
        return embedded
    return request.getfixturevalue("shared") / "models" / "tiny-chat"
