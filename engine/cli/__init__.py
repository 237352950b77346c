"""The command line: a folder for each group of verbs, a module for each verb."""
import sys
from pathlib import Path

from engine.core import UserError
from engine.progress import Progress


def report(text: str, share: float | None = None) -> None:
    """A line for people. Standard output is for the document of `--json` alone."""
    print(text, file=sys.stderr, flush=True)


def progress_line(text: str = "") -> None:
    """What is rewritten while something takes long; without a text the line ends."""
    print(f"\r{text}   " if text else "\n", end="", file=sys.stderr, flush=True)


def check_out(path: Path) -> Path:
    """A file that will be written after minutes of work. UserError where it cannot be."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file to write.")
    if not path.parent.is_dir():
        raise UserError(f"There is no folder {path.parent}; make it first.")
    return path


def on_processor(device: str | None, verb: str) -> str:
    """The device of what looks at every token. UserError where a card is asked for."""
    if device == "cuda":
        raise UserError(f"`{verb}` runs on the processor, where each step can be looked at; leave --device cuda out.")
    return "cpu"


def report_layers(progress: Progress) -> None:
    """A line about a compression: a sentence, or where it is."""
    report(progress.text if progress.seconds_left is None else
           f"layer {progress.done_bytes}/{progress.total_bytes}  {progress.bytes_per_second / 1e6:.1f} M weights/s  "
           f"{progress.seconds_left:.0f} s left")
