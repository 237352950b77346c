"""What the embedded model promises, on held-out chat and on held-out stories, each; and how true its codes are.

Losses are taken many tokens at once (the simulation that calibration uses); that the cache one token a step gives the
same loss, and which bytes it moves, is measured on a shorter piece of the same texts. Only the first 63 chats and 88
stories are read here; the embedded model's codes and levels know others (its card says which), and of WikiText-2 none.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.core import PROMISES, Options
from engine.experts.layer import LevelPlan
from engine.library.compress import compress
from engine.model import load
from engine.quality.calibrate import documents_of
from engine.quality.evaluate import evaluate, longest
from engine.quality.loss_probe import Sums, log_probabilities
from engine.quality.sparse_forward import DecodedExperts, LayerTrace, Simulation
from engine.quality.texts import read_tokens

pytestmark = pytest.mark.slow
TEXTS = ("heldout_chat.jsonl.xz", "heldout_tinystories.txt.xz")
TOKENS, FEW_TOKENS, KL_TOKENS = 20_000, 160, 6_000
FP16 = 2  # bytes a weight


@dataclass
class Texts:
    """Documents of each text, and the loss of the uncompressed checkpoint on them."""

    documents: dict[str, list[list[int]]]
    checkpoint: dict[str, float]


def mean_loss(model, documents: list[list[int]]) -> float:
    """Nats per predicted token, each document in one forward."""
    total = 0.0
    with torch.inference_mode():
        for ids in documents:
            logp = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0].float().log_softmax(-1)
            total -= float(logp[range(len(ids) - 1), ids[1:]].sum())
    return total / sum(len(ids) - 1 for ids in documents)


def open_at_best(folder: Path) -> load.Loaded:
    return load.load(folder, Options(level="exact", device="cpu", predict=False))


class Model:
    """A compressed folder whose losses and bytes are asked for; a loss is computed once."""

    def __init__(self, folder: Path) -> None:
        self.loaded = open_at_best(folder)
        self.runtime, self.decoded, self._losses = self.loaded.runtime, DecodedExperts(self.loaded.runtime), {}

    def loss(self, plan: LevelPlan | None, texts: Texts, name: str, see=None) -> float:
        key = (plan, name)
        if key not in self._losses or see is not None:
            with self.runtime.hooked(Simulation(self.decoded, plan, see)):
                self._losses[key] = mean_loss(self.loaded.model, texts.documents[name])
        return self._losses[key]

    def rise(self, level: str, texts: Texts, name: str) -> float:
        """Perplexity over `exact`, as a fraction."""
        plan = self.runtime.plans[level]
        return math.expm1(self.loss(plan, texts, name) - self.loss(None, texts, name))


@pytest.fixture(scope="module")
def demo(repository: Path) -> Model:
    return Model(repository / "assets" / "demo")


@pytest.fixture(scope="module")
def texts(shared: Path, demo: Model) -> Texts:
    longest_piece = longest(demo.loaded)
    documents = {name: read_tokens(shared / "data" / name, demo.loaded.tokenizer, TOKENS, longest_piece)
                 for name in TEXTS}
    model = load.load(shared / "models" / "tiny-chat", Options(level="full", device="cpu")).model
    return Texts(documents, {name: mean_loss(model, found) for name, found in documents.items()})


@pytest.fixture(scope="module")
def trunks(shared: Path, tmp_path_factory: pytest.TempPathFactory, demo: Model) -> dict[int, Path]:
    """The checkpoint compressed without a text, by the bits of its trunk; the embedded model's has 8."""
    folders = {bits: tmp_path_factory.mktemp("trunk") / str(bits) for bits in (16, 8, 4)}
    for bits, folder in folders.items():
        compress(shared / "models" / "tiny-chat", folder, demo.runtime.far.layout.group, bits)
    return folders


@pytest.mark.parametrize("name", TEXTS)
def test_exact_and_the_trunk(demo: Model, trunks: dict[int, Path], texts: Texts, name: str) -> None:
    sixteen, four = (mean_loss(open_at_best(trunks[bits]).model, texts.documents[name]) for bits in (16, 4))
    assert math.expm1(sixteen - texts.checkpoint[name]) <= 0.015
    assert math.expm1(demo.loss(None, texts, name) - sixteen) <= 0.003
    assert math.expm1(four - sixteen) <= 0.01


@pytest.mark.parametrize(("name", "most"), [(TEXTS[0], 0.65), (TEXTS[1], 0.8), ("heldout_wikitext2.txt.xz", 0.55)])
def test_codes_over_texts_diverge_less(demo: Model, trunks: dict[int, Path], shared: Path, name: str, most: float,
                                       ) -> None:
    """From the checkpoint, as a share of what those without a text do."""
    checkpoint = load.load(shared / "models" / "tiny-chat", Options(level="full", device="cpu")).model
    models, sums = (demo.loaded.model, open_at_best(trunks[8]).model), (Sums(), Sums())
    with torch.inference_mode():
        for ids in documents_of(shared / "data" / name, demo.loaded.tokenizer, KL_TOKENS):
            reference = log_probabilities(checkpoint, ids)
            for model, total in zip(models, sums, strict=True):
                total.add(log_probabilities(model, ids), reference, ids[0, 1:])
    ours, plain = (total.figures()["kl"] for total in sums)
    assert ours <= most * plain, (ours, plain)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("level", PROMISES)
def test_a_level_keeps_its_promise(demo: Model, texts: Texts, level: str, name: str) -> None:
    rise = demo.rise(level, texts, name)
    assert rise <= PROMISES[level]


@pytest.mark.parametrize("name", TEXTS)
def test_far_bytes_with_sketches_near_and_nothing_kept(demo: Model, texts: Texts, name: str) -> None:
    """And that bytes are misses times the sizes of what is missed."""
    far, levels = demo.runtime.far, ["exact", "quality", "balanced", "fast"]
    found = evaluate(demo.loaded, [texts.documents[name][0][:FEW_TOKENS]], levels, "sketches")
    exact, quality, balanced, fast = (row.far_bytes_per_token for row in found.levels)
    routed = far.layers * demo.runtime.top_k
    assert exact == routed * far.layout.blob_bytes
    for level, seen in (("quality", quality), ("balanced", balanced), ("fast", fast)):
        refined, down_only = map(sum, zip(*demo.runtime.plans[level].budgets, strict=True))
        assert seen == refined * far.layout.record + down_only * far.layout.prefix
    assert balanced <= 0.4 * exact
    assert fast <= 0.25 * exact
    assert fast <= routed * 3 * far.neurons * far.hidden * FP16 / 16


@pytest.mark.parametrize(("level", "apart"), [("exact", 1e-4), ("balanced", 5e-3), ("fast", 5e-3)])
def test_one_token_a_step_through_the_cache_loses_the_same(demo: Model, texts: Texts, level: str, apart: float) -> None:
    """A neuron at the edge of the budget falls to either side, as the sums of its scores are rounded: one document of
    160 tokens differs by up to .02 nats then, either way."""
    documents = [document[:FEW_TOKENS] for document in texts.documents[TEXTS[0]][1:17]]
    plan = demo.runtime.plans.get(level)
    with demo.runtime.hooked(Simulation(demo.decoded, plan)):
        together = mean_loss(demo.loaded.model, documents)
    for near in ("all", "sketches"):
        row, = evaluate(demo.loaded, documents, [level], near).levels
        assert math.log(row.perplexity) == pytest.approx(together, abs=apart)


@pytest.mark.parametrize("name", TEXTS)
def test_balanced_against_floe_at_the_same_bytes(demo: Model, texts: Texts, name: str) -> None:
    layout = demo.runtime.far.layout
    refined, down_only = map(sum, zip(*demo.runtime.plans["balanced"].budgets, strict=True))
    wanted = refined * layout.record + down_only * layout.prefix
    floe, loss = matched(demo, texts, name, wanted)
    balanced = demo.loss(demo.runtime.plans["balanced"], texts, name)
    lost, floe_lost = (math.expm1(found - texts.checkpoint[name]) for found in (balanced, loss))
    assert abs(floe / wanted - 1) <= 0.02
    assert lost <= 0.2 * floe_lost, (lost, floe_lost)


def matched(demo: Model, texts: Texts, name: str, wanted: float) -> tuple[float, float]:
    """FloE's thresholds times one factor, so that it asks for `wanted` bytes a token: (bytes found, loss).

    Secants of log bytes over log factor; the first slope is a guess.
    """
    slope, at, before = -1.0, 0.0, None
    for _ in range(8):
        found, loss = floe_at(math.exp(at), demo, texts, name)
        off = math.log(found / wanted)
        if abs(off) <= 0.01:
            break
        if before is not None:
            slope = (off - before[1]) / (at - before[0])
        before = (at, off)
        at -= off / slope
    return found, loss


def floe_at(factor: float, demo: Model, texts: Texts, name: str) -> tuple[float, float]:
    """Record bytes a token and loss of FloE's rule with its thresholds times `factor`."""
    kept = n_tokens = 0

    def see(seen: LayerTrace) -> None:
        nonlocal kept, n_tokens
        kept += int((seen.fidelity >= 0).sum())
        n_tokens += len(seen.ids) if seen.layer == 0 else 0
    rows = demo.runtime.plans["floe"].thresholds
    plan = LevelPlan(thresholds=tuple(tuple(factor * t for t in row) for row in rows))
    loss = demo.loss(plan, texts, name, see)
    return kept * demo.runtime.far.layout.record / n_tokens, loss
