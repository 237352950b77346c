"""Whether a folder has what a chat needs besides weights, looked at before anybody works on it for hours."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from engine.core import UserError
from engine.disk import read_json

LFS = b"version https://git-lfs.github.com/spec/"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")    # of which a made folder has one
VOCABULARIES = (*TOKENIZERS, "vocab.txt", "spiece.model")           # of which a folder that is opened has one
TEMPLATE = "chat_template.jinja"
POINTER_BYTES = 1024  # more than any such note has


def check_chat_parts(folder: Path, repository: str = "", others: Iterable[str] = ()) -> None:
    """UserError for a file that Git LFS has not fetched, and where there is no tokenizer or no chat template.

    repository: the one of the Hub that the folder's files come from, whose other files have these names.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < POINTER_BYTES and is_pointer(path):
            raise UserError(only_a_note(f"{repository}/{path.name}", "choose another source") if repository else
                            only_a_note(path))
    names, place = {path.name for path in folder.iterdir() if path.is_file()} | set(others), repository or folder
    if names.isdisjoint(TOKENIZERS):
        raise UserError(f"{place} has no tokenizer (tokenizer.json), so nobody could talk to what is made of it; get "
                        "that of the original model first.")
    if TEMPLATE not in names and not has_template(folder):
        raise UserError(f"{place} has no chat template (chat_template.jinja), so it is no chat model; take the "
                        "variant that was tuned for chat, or put its template into the folder.")


def is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def only_a_note(place: str | Path, instead: str = "fetch it with git lfs pull, or download the model again") -> str:
    """What is said of a pointer."""
    return f"{place} is not there, only the note of Git LFS that stands for it; {instead}."


def has_template(folder: Path) -> bool:
    """Whether transformers' tokenizer finds a chat template in a folder; chat_template.json it does not read."""
    if (folder / TEMPLATE).is_file():
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
