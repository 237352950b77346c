"""The second context memory, in which a program's answer rests while the page's is written: counted where it fits
beside what is near, and never in its place."""
from __future__ import annotations

from dataclasses import replace

import pytest

from engine.library import catalogue
from engine.machine import table
from engine.planning.explain import plan_text, programs
from engine.planning.pictures import plan_pictures
from engine.planning.plan import RESTING, PlanRequest
from engine.planning.planner import plan
from engine.planning.sizes import side_bytes

SPECS = {name: entry.spec for name, entry in catalogue.entries().items()}
CPU = table.described("cpu-ddr4")


@pytest.mark.parametrize("name", ["olmoe-1b-7b", "qwen3.6-35b-a3b", "gpt-oss-20b"])
def test_it_takes_what_the_page_s_context_and_states_take(name):
    spec = SPECS[name]
    roomy = plan(spec, replace(CPU, ram_free_bytes=10**12), PlanRequest(level="exact", context=2048))
    parts = dict(roomy.memory)
    page = parts["context memory (KV)"] + parts["recurrent and window state"]
    assert roomy.gives_way and parts[RESTING] == roomy.resting_bytes == page > 2 * side_bytes(spec, 2048) > 0
    assert roomy.ram_bytes == sum(parts.values()) + roomy.near_bytes and programs(roomy) == ""
    needed = plan_pictures(roomy)["main"]["needed"]
    assert needed == roomy.ram_bytes and plan_pictures(roomy)["programs"] == ""


@pytest.mark.parametrize("near_bytes", [None, 2 * 10**9])
def test_where_it_does_not_fit_programs_wait_and_nothing_else_changes(near_bytes):
    """One byte decides; what is near, and how quick a token is, does not depend on it."""
    wishes = PlanRequest(level="exact", context=4096, near_bytes=near_bytes)
    roomy = plan(SPECS["olmoe-1b-7b"], replace(CPU, ram_free_bytes=10**12), wishes)
    file = 0 if near_bytes is None else SPECS["olmoe-1b-7b"].n_experts_total * 1024 * (1152 + 2304)
    just, short = (plan(SPECS["olmoe-1b-7b"], replace(CPU, ram_free_bytes=roomy.ram_bytes + file - less), wishes)
                   for less in (0, 1))
    assert just.gives_way and not short.gives_way and RESTING not in dict(short.memory)
    assert short.near == just.near == roomy.near and short.ram_bytes == just.ram_bytes - just.resting_bytes
    assert short.decode_tokens_per_second == just.decode_tokens_per_second and short.verdict == just.verdict
    assert "written to its end before the page's begins" in plan_text(short) and programs(just) == ""
    assert plan_pictures(short)["programs"] == programs(short)


def test_more_memory_never_takes_it_away_and_a_card_has_one_context():
    ways = [plan(SPECS["qwen3-30b-a3b"], replace(CPU, ram_free_bytes=n * 10**9), PlanRequest(level="exact")).gives_way
            for n in range(6, 48)]
    assert ways == sorted(ways) and ways[0] != ways[-1]
    on_card = plan(SPECS["qwen3-30b-a3b"], table.described("rtx-3060-12gb"))
    assert not on_card.gives_way and programs(on_card) == "" and RESTING not in dict(on_card.memory)
