"""The bars of a plan add up to the plan's own sums, on cards and without one, at every level; losses are measured ones
where the folder has them."""
from __future__ import annotations

import pytest

from engine.core import PROMISES
from engine.library import catalogue
from engine.machine import table
from engine.planning.pictures import plan_pictures
from engine.planning.plan import PlanRequest
from engine.planning.planner import plan

SPECS = {name: entry.spec for name, entry in catalogue.entries().items()}


@pytest.mark.parametrize("level", ["exact", "balanced", "full"])
@pytest.mark.parametrize("machine", ["rtx-3060-12gb", "rtx-4060-8gb", "cpu-ddr5"])
def test_the_bars_add_up_to_the_plans_sums(machine, level):
    for name, spec in SPECS.items():
        made = plan(spec, table.described(machine), PlanRequest(level=level))
        drawn = plan_pictures(made)
        near, far = drawn["video"], drawn["main"]
        if made.device == "cuda":
            assert (near["needed"], near["free"]) == (made.vram_bytes, made.near_free_bytes), name
        assert (near is None) == (made.device == "cpu")
        assert (far["needed"], far["free"]) == (made.ram_bytes, made.ram_free_bytes), name
        assert all(n > 0 for bar in (near, far) if bar for _, n in bar["parts"])
        assert bool(drawn["missing"]) == (made.verdict == "no") == (drawn["token"] == [])
        if made.verdict != "no":
            assert sum(ms for _, ms in drawn["token"]) == pytest.approx(1e3 / made.decode_tokens_per_second)


def test_a_loss_is_measured_where_the_folder_has_it_and_promised_elsewhere():
    made = plan(SPECS["qwen3-30b-a3b"], table.described("rtx-3060-12gb"))
    rows = {row["level"]: row for row in plan_pictures(made)["speeds"]}
    assert {level: row["loss"] for level, row in rows.items()} == {"exact": 0.0} | PROMISES
    assert not any(row["measured"] for row in rows.values())
    measured = {"levels": {"exact": {"perplexity": 10.0}, "fast": {"perplexity": 10.2}}}
    rows = {row["level"]: row for row in plan_pictures(made, measured)["speeds"]}
    assert rows["fast"]["measured"] and rows["fast"]["loss"] == pytest.approx(0.02)
    assert rows["quality"] == rows["quality"] | {"measured": False, "loss": PROMISES["quality"]}
