"""What is recommended: one model that is practical, or none; less than a token a second is never called slow."""
from __future__ import annotations

from dataclasses import replace

import pytest

from engine.library.catalogue import entries
from engine.library.recommend import PRACTICAL, VERDICTS, recommendations
from engine.machine import table


@pytest.mark.parametrize("machine", sorted(table.rows()))
def test_the_verdict_is_the_speeds_and_what_is_recommended_is_practical(machine):
    rows = recommendations(table.described(machine))
    assert [VERDICTS.index(row.verdict) for row in rows] == sorted(VERDICTS.index(row.verdict) for row in rows)
    for row in rows:
        expected = {"fits": row.tokens_per_second >= 10, "slow": PRACTICAL <= row.tokens_per_second < 10,
                    "impractical": 0 < row.tokens_per_second < PRACTICAL, "no": row.missing != ""}
        assert expected[row.verdict], row
    chosen = [row for row in rows if row.recommended]
    practical = [row for row in rows if row.verdict in ("fits", "slow")]
    assert chosen == rows[:len(chosen)] and len(chosen) == bool(practical) and all(row in practical for row in chosen)


def test_the_best_known_that_fits_is_recommended_and_nothing_where_nothing_is_practical():
    machine = table.described("rtx-3060-12gb")
    assert next(row.name for row in recommendations(machine) if row.recommended) == next(iter(entries()))
    crawling = replace(machine, vram_bytes_per_second=1e8, link_bytes_per_second=1e7)
    rows = recommendations(crawling)
    assert {row.verdict for row in rows} <= {"impractical", "no"} and not any(row.recommended for row in rows)
    tiny = replace(machine, vram_free_bytes=10**8)
    rows = recommendations(tiny)
    assert {row.verdict for row in rows} == {"no"} and not any(row.recommended for row in rows)
    assert all(row.missing.startswith("Lacks ") for row in rows)
    assert "video memory" in next(row.missing for row in rows if row.name == "qwen3.6-35b-a3b")
