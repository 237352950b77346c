"""What opening on a card does with its memory, where a processor can show it: the device's side over its tensors."""
from __future__ import annotations

import pytest

from engine.core import Options
from engine.machine.table import described
from engine.model import load
from engine.model.placement import LATER, experts_on_gpu, into_what_is_free
from engine.planning.planner import plan
from kernels import dispatch
from tests.engine.experts.on_device import take_over
from tests.engine.experts.test_far_locked import Ledger
from tests.support.folders import checkpoint


@pytest.fixture
def opened(demo_checkpoint):
    loaded = load.load(demo_checkpoint, Options("exact", device="cpu"))
    runtime = take_over(loaded)
    runtime.set_level("exact", runtime.everything_bytes() // 2)
    card = plan(loaded.spec, described("rtx-3060-12gb"))
    return runtime, card, sum(size for part, size in card.memory if part in LATER)


def test_every_part_that_comes_later_is_a_part_of_the_plan(opened):
    assert set(LATER) <= {part for part, _ in opened[1].memory}


@pytest.mark.parametrize("spare", [0, 10**9])
def test_what_was_planned_stays_where_the_card_has_it(opened, spare):
    (runtime, card, later), said = opened, []
    before = runtime.near
    into_what_is_free(runtime, card, later + spare, lambda text, share: said.append(text))
    assert runtime.near is before and not said and not runtime.reason


@pytest.mark.parametrize("lacking", [10**5, 10**12])
def test_near_memory_gives_back_what_the_card_lacks(opened, lacking):
    (runtime, card, later), said = opened, []
    before, least = runtime.near_bytes, runtime.smallest_bytes()
    into_what_is_free(runtime, card, later - lacking, lambda text, share: said.append(text))
    assert least <= runtime.near_bytes <= max(least, before - lacking)
    assert said == [runtime.reason] and "Close other programs" in runtime.reason


def test_the_processor_is_prepared_where_the_card_computes_no_such_experts(tmp_path, monkeypatch):
    """Else the first answer would wait for its compiler, which says here that it is not there."""
    checkpoint("qwen3_moe", tmp_path)
    loaded, said = load.load(tmp_path, Options("full", device="cpu")), []
    monkeypatch.setattr(dispatch, "_refusals", ["ImportError: numba"])
    runtime = experts_on_gpu(loaded.model, loaded.runtime.far, tmp_path, "full", loaded.planner, Options("full"),
                             lambda text, share: said.append(text), Ledger(), "cpu")
    assert said[0].startswith("Preparing the processor") and said[1:] == [runtime.reason]
    assert "the processor computes its experts" in runtime.reason and "install numba" in runtime.reason
