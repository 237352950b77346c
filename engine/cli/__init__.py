"""The command line: a folder for each group of verbs, a module for each verb."""
import sys


def report(text: str, share: float | None = None) -> None:
    """A line for people. Standard output is for the document of `--json` alone."""
    print(text, file=sys.stderr)
