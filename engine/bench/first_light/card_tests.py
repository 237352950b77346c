"""Step 10: the repository's own tests for a card, a row for each as it ends."""
from __future__ import annotations

from collections.abc import Iterator

from engine.bench.first_light.findings import Finding
from engine.bench.first_light.process import ROOT
from engine.bench.rows import Row, say

TESTS = ROOT / "tests" / "test_on_gpu.py"


class _Each:
    """What pytest tells of every test."""

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            note = "" if report.passed else str(report.longrepr)[-400:]
            name = report.nodeid.rpartition("::")[2]
            print()     # pytest's own line has not ended
            if report.skipped:
                say({"measured": "test", "name": name, "skipped": note})
            elif report.when == "call" or report.failed:
                say(Finding("a test for a card", report.passed, report.duration, "s", case=name, note=note).row())


def tests(path=TESTS, *options: str) -> Iterator[Row]:
    """Up to the first that fails."""
    import pytest  # a machine without it has the other steps
    code = int(pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", *options, str(path)], plugins=[_Each()]))
    yield Finding("the tests for a card", code == 0, float(code), "is pytest's exit code").row()
