"""The command line: a folder for each group of verbs, a module for each verb."""
import sys

from engine.progress import Progress


def report(text: str, share: float | None = None) -> None:
    """A line for people. Standard output is for the document of `--json` alone."""
    print(text, file=sys.stderr, flush=True)


def report_layers(progress: Progress) -> None:
    """A line about a compression: a sentence, or where it is."""
    report(progress.text if progress.seconds_left is None else
           f"layer {progress.done_bytes}/{progress.total_bytes}  {progress.bytes_per_second / 1e6:.1f} M weights/s  "
           f"{progress.seconds_left:.0f} s left")
