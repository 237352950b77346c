"""`eval`: its numbers against plain transformers forwards, its bytes against object sizes."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.__main__ import main
from engine.core import Options, UserError
from engine.experts.layer import LevelPlan
from engine.model import load
from engine.quality.evaluate import evaluate, longest
from tests.support import small_model

DOCUMENTS = [[5, 99, 300, 7, 1200, 41, 5, 99], [17, 4, 2000, 17], [8, 9]]
N_PREDICTED = sum(len(ids) - 1 for ids in DOCUMENTS)
REFINED, DOWN_ONLY = 9, 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> tuple[Path, Path]:
    return small_model.make(tmp_path_factory.mktemp("small"), demo_checkpoint)


@pytest.fixture(scope="module")
def checkpoint(folders) -> load.Loaded:
    return load.load(folders[0], Options(level="full", device="cpu"))


@pytest.fixture(scope="module")
def compressed(folders) -> load.Loaded:
    loaded = load.load(folders[1], Options(level="exact", device="cpu"))
    loaded.runtime.plans["balanced"] = LevelPlan(budgets=((REFINED, DOWN_ONLY),) * small_model.LAYERS)
    everything = ((small_model.NEURONS * small_model.TOP_K, 0),) * small_model.LAYERS
    loaded.runtime.plans["quality"] = LevelPlan(budgets=everything)
    return loaded


def log_probabilities(folder: Path) -> list[torch.Tensor]:
    """[T-1, V] of each document by one plain forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1) for ids in DOCUMENTS]


def perplexity(logp: list[torch.Tensor]) -> float:
    targets = [torch.tensor(ids[1:])[:, None] for ids in DOCUMENTS]
    return float(torch.cat([a.gather(1, t) for a, t in zip(logp, targets, strict=True)]).mean().neg().exp())


def test_numbers_are_those_of_plain_forwards(folders, checkpoint, compressed) -> None:
    p, q = log_probabilities(folders[0]), log_probabilities(folders[1])
    found = evaluate(compressed, DOCUMENTS, ["exact"], reference=checkpoint)
    assert found.tokens == N_PREDICTED
    assert found.reference_perplexity == pytest.approx(perplexity(p), rel=1e-4)
    exact, = found.levels
    assert exact.perplexity == pytest.approx(perplexity(q), rel=1e-4)
    p, q = torch.cat(p), torch.cat(q)
    assert exact.kl == pytest.approx(float(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)),
                                     rel=1e-3)
    assert exact.kl > 1e-3, "4 bits changed nothing: the comparison would be empty"
    assert exact.top1_agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).float().mean()))


def test_without_a_source_the_reference_is_exact(compressed) -> None:
    found = evaluate(compressed, DOCUMENTS, ["exact", "quality", "balanced"])
    exact, quality, balanced = found.levels
    for same in (exact, quality):  # `quality` keeps every neuron here
        assert same.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)
        assert same.kl < 1e-6 and same.top1_agreement == 1
    assert balanced.kl > 10 * quality.kl and balanced.kl > 1e-4


def test_bytes_of_misses_when_nothing_is_kept(compressed) -> None:
    layout, per_token = compressed.runtime.far.layout, small_model.LAYERS * small_model.TOP_K
    exact, balanced = evaluate(compressed, DOCUMENTS, ["exact", "balanced"], "sketches").levels
    assert exact.far_bytes_per_token == per_token * layout.blob_bytes and exact.hit_rate == 0
    records = small_model.LAYERS * (REFINED * layout.record + DOWN_ONLY * layout.prefix)
    sketches = per_token * layout.sketch_bytes
    assert balanced.far_bytes_per_token == records
    assert balanced.hit_rate == pytest.approx(sketches / (sketches + records))


def test_every_document_starts_with_an_empty_cache(compressed) -> None:
    levels, far = ["exact", "balanced"], compressed.runtime.far
    most = far.layers * far.experts * far.expert_bytes - 1  # else the file itself is near
    once = evaluate(compressed, DOCUMENTS[:1], levels, most).levels
    twice = evaluate(compressed, DOCUMENTS[:1] * 2, levels, most).levels
    nothing = evaluate(compressed, DOCUMENTS[:1], levels, "sketches").levels
    for a, b, c in zip(once, twice, nothing, strict=True):
        assert a.far_bytes_per_token == b.far_bytes_per_token
        assert 0 < a.far_bytes_per_token < c.far_bytes_per_token
        assert (a.perplexity, a.kl) == pytest.approx((c.perplexity, c.kl), rel=1e-5, abs=1e-9)


def test_a_number_of_bytes_lies_between(compressed) -> None:
    def far(near: int | str) -> float:
        return evaluate(compressed, DOCUMENTS[:1], ["exact"], near).levels[0].far_bytes_per_token
    row = 3 * small_model.NEURONS * small_model.HIDDEN * 4
    assert far("all") <= far(6 * row) < far("sketches")
    with pytest.raises(UserError, match="give at least"):
        far(row - 1)


def test_the_runtime_is_left_as_it_was(compressed) -> None:
    runtime = compressed.runtime
    runtime.set_level("balanced", 10**6)
    runtime.phase, runtime.predict = "auto", True
    evaluate(compressed, DOCUMENTS[2:], ["exact"])
    assert (runtime.level, runtime.near_wish, runtime.phase, runtime.predict) == ("balanced", 10**6, "auto", True)


def test_a_level_that_is_not_offered_and_another_vocabulary(compressed, tmp_path: Path, demo_checkpoint) -> None:
    with pytest.raises(UserError, match="offers exact, quality, balanced"):
        evaluate(compressed, DOCUMENTS, ["floe"])
    other, _ = small_model.make(tmp_path, demo_checkpoint, vocabulary=4160)
    with pytest.raises(UserError, match="4,160 tokens"):
        evaluate(compressed, DOCUMENTS, ["exact"], reference=load.load(other, Options(level="full", device="cpu")))


def test_the_command(folders, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A dog ran.\n<|endoftext|>\n" + "The dog ran to the tree. " * 5)
    arguments = ["eval", str(folders[1]), "--levels", "exact", "--reference", str(folders[0]), "--text", str(text),
                 "--tokens", "20", "--near", "sketches", "--json", "--device", "cpu"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    document = json.loads(out)
    assert out.count("\n") == 1 and list(document) == ["reference_perplexity", "tokens", "levels"]
    assert document["tokens"] == 20
    assert list(document["levels"][0]) == ["level", "perplexity", "kl", "top1_agreement", "far_bytes_per_token",
                                           "hit_rate"]
    assert main(["eval", str(folders[1]), "--levels", "exact,best"]) == 2
    assert "no level 'best'" in capsys.readouterr().err
    assert main([*arguments[:2], "--text", str(text), "--near", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("1 bytes of near memory do not hold what a step needs")


def test_documents_are_no_longer_than_the_context(compressed) -> None:
    assert longest(compressed) == 256
