"""Whether a folder has what a chat needs besides weights, looked at before anybody works on it for hours."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from engine.core import UserError
from engine.disk import read_json

LFS = b"version https://git-lfs.github.com/spec/"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
POINTER_BYTES = 1024  # more than any such note has


def check_chat_parts(folder: Path, repository: str = "", others: Iterable[str] = ()) -> None:
    """UserError for a file that Git LFS has not fetched, and where there is no tokenizer or no chat template.

    repository: the one of the Hub that the folder's files come from, whose other files have these names.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < POINTER_BYTES and is_pointer(path):
            place, instead = (f"{repository}/{path.name}", "choose another source") if repository else (
                path, "fetch it with git lfs pull, or download the model again")
            raise UserError(f"{place} is not there, only the note of Git LFS that stands for it; {instead}.")
    names, place = {path.name for path in folder.iterdir() if path.is_file()} | set(others), repository or folder
    if names.isdisjoint(VOCABULARIES):
        raise UserError(f"{place} has no tokenizer (tokenizer.json), so nobody could talk to what is made of it; get "
                        "that of the original model first.")
    if names.isdisjoint(TEMPLATES) and not _has_template(folder / "tokenizer_config.json"):
        raise UserError(f"{place} has no chat template (chat_template.jinja), so it is no chat model; take the "
                        "variant that was tuned for chat, or put its template into the folder.")


def is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def _has_template(path: Path) -> bool:
    try:
        return bool(read_json(path).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
