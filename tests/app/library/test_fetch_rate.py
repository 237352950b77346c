"""The speed of earlier downloads: measured over what has arrived, kept, and unknown before."""
from __future__ import annotations

import pytest

from app.library.fetch_rate import KEPT, FetchRate
from engine import Progress, Stopped

MB = 10**6


@pytest.fixture
def rate(tmp_path):
    """A rate whose clock goes on by a second at each look."""
    seconds = iter(range(10_000))
    return FetchRate(tmp_path / "downloads.json", lambda: next(seconds))


def fetch(rate, *megabytes: int, error: Exception | None = None) -> list[Progress]:
    heard = []

    def work(report):
        report(Progress(0, 1, 0.0, None, "Looking"))
        for done in megabytes:
            report(Progress(done * MB, 100 * MB, 0.0, None))
        if error:
            raise error
    rate.timed(work, heard.append)
    return heard


def test_nothing_is_promised_before_anything_was_measured(rate):
    assert rate.bytes_per_second() is None
    assert len(fetch(rate, 40)) == 2 and rate.bytes_per_second() is None  # it was all there already
    fetch(rate)
    assert rate.bytes_per_second() is None


def test_the_bytes_that_came_are_counted_over_their_seconds(rate, tmp_path):
    fetch(rate, 10, 30, 50)  # ten were there before; two seconds
    assert rate.bytes_per_second() == 20 * MB
    with pytest.raises(Stopped):
        fetch(rate, 0, 80, error=Stopped())  # one second, and it was paused
    assert rate.bytes_per_second() == pytest.approx((40 + 80) * MB / 3)
    assert FetchRate(tmp_path / "downloads.json").bytes_per_second() == rate.bytes_per_second()


def test_the_last_downloads_count(rate):
    for _ in range(KEPT):
        fetch(rate, 0, 2)
    for _ in range(KEPT):
        fetch(rate, 0, 90)
    assert rate.bytes_per_second() == 90 * MB


@pytest.mark.parametrize("text", ["", "{", "[[1]]", "[[-1, 2]]", '{"a": 1}', '[["x", 1]]', "[[1, 0]]", "null"])
def test_a_damaged_note_is_no_note(tmp_path, text):
    (tmp_path / "downloads.json").write_text(text)
    assert FetchRate(tmp_path / "downloads.json").bytes_per_second() is None
