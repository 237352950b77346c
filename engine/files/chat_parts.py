"""Whether a folder has what a chat needs besides weights, looked at before anybody works on it for hours."""
from __future__ import annotations

from pathlib import Path

from engine.core import UserError
from engine.disk import read_json

LFS = b"version https://git-lfs.github.com/spec/"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TEMPLATES = ("chat_template.jinja", "chat_template.json")


def check_chat_parts(folder: Path) -> None:
    """UserError for a file that Git LFS has not fetched, and where there is no tokenizer or no chat template."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and is_pointer(path):
            raise UserError(f"{path} is not there, only the note of Git LFS that stands for it; fetch it with git lfs "
                            "pull, or download the model again.")
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json), so nobody could talk to what is made of it; get "
                        "that of the original model first.")
    if not (any((folder / name).is_file() for name in TEMPLATES) or _has_template(folder / "tokenizer_config.json")):
        raise UserError(f"{folder} has no chat template (chat_template.jinja), so it is no chat model; take the "
                        "variant that was tuned for chat, or put its template into the folder.")


def is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def _has_template(path: Path) -> bool:
    try:
        return bool(read_json(path).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
