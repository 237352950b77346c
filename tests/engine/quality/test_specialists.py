"""Specialists on tiny models: what is counted, what is left out, what is mixed, and the folder that comes of it."""
from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.core import Options, Stopped, UserError
from engine.experts.hook import Hook
from engine.files.compressed import ExpertsFile
from engine.files.manifest import Manifest, experts_name
from engine.library.publish import card
from engine.model.load import load
from engine.policies.usage import Usage, of_trace
from engine.quality.specialists.examples import Counting, examples_of, loss
from engine.quality.specialists.heat_map import heat_map
from engine.quality.specialists.make import NOTE, SEARCHED, Choice, specialise
from engine.quality.specialists.mixed_model import MixedModel, Source, matrices_of
from engine.quality.specialists.mixture import Mixture, alike, identity, masked, merged
from engine.quality.specialists.search import search
from tests.engine.quality.test_evidence import made as a_trace
from tests.support.folders import compressed, listed_anew, stored_experts, write_tokenizer

IDS = torch.randint(3, 128, (3, 17), generator=torch.Generator().manual_seed(1))
KEPT = [[0, 2], [1, 3]]
LAYERS, EXPERTS = 2, 4


@pytest.fixture(scope="module", params=["gpt_oss", "mixtral"])
def folder(request, tmp_path_factory) -> Path:
    """gpt_oss: biases of experts and router, interleaved gate and up, another gate."""
    folder = compressed(request.param, tmp_path_factory.mktemp(request.param), trunk_bits=8)[2]
    write_tokenizer(folder, apart=True)
    return listed_anew(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """280 pieces of six words each; a search wants 200 beside those that are kept back."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(" ".join(f"w{n}" for n in draw.integers(3, 60, 6)) for _ in range(280)))
    return path


@torch.inference_mode()
def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits


@torch.inference_mode()
def of_folder(folder: Path, hook: Hook | None = None) -> torch.Tensor:
    loaded = load(folder, Options("exact", device="cpu"))
    try:
        with loaded.runtime.hooked(hook or Hook()):
            return logits(loaded.model)
    finally:
        loaded.runtime.close()


def test_the_identity_is_the_model_itself(folder):
    model = MixedModel(Source(folder), EXPERTS)
    model.take(identity(LAYERS, EXPERTS))
    torch.testing.assert_close(logits(model.model), of_folder(folder), rtol=0, atol=2e-3)


class Masking(Hook):
    """Mixtral's router, said once more: the best k of the experts that are left, by a softmax over these."""

    def routed(self, layer, x, ids, weights):
        left_out = [e for e in range(EXPERTS) if e not in KEPT[layer.index]]
        found = (x.float() @ layer.router_weight.T).index_fill(1, torch.tensor(left_out), -torch.inf)
        share, ids = found.softmax(1).topk(ids.shape[1])
        return ids, share / share.sum(1, keepdim=True)


def test_one_hot_rows_are_masking(folder):
    model = MixedModel(Source(folder), 2)
    model.take(masked(KEPT, EXPERTS))
    if "mixtral" in str(folder):
        wanted = of_folder(folder, Masking())
    else:  # gpt_oss has a bias to say it with
        loaded = load(folder, Options("exact", device="cpu"))
        for layer, kept in zip(loaded.model.model.layers, KEPT, strict=True):
            layer.mlp.router.bias.data[[e for e in range(EXPERTS) if e not in kept]] = -1e9
        wanted = logits(loaded.model)
        loaded.runtime.close()
    torch.testing.assert_close(logits(model.model), wanted, rtol=0, atol=2e-3)


def test_what_is_counted_is_what_the_runtime_routes(folder):
    seen: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class Watching(Hook):
        def routed(self, layer, x, ids, weights):
            seen.append((layer.index, x.float(), ids.clone(), weights.float()))
            return ids, weights
    of_folder(folder, Watching())
    counting = Counting(Source(folder))
    counting_logits = logits(counting.model)
    usage = counting.usage()
    assert counting_logits.shape[:2] == IDS.shape and usage.tokens == IDS.numel()
    assert (usage.hard.sum(1) == usage.tokens * usage.top_k).all()
    hard, soft = np.zeros((LAYERS, EXPERTS), int), np.zeros((LAYERS, EXPERTS))
    for layer, _, ids, weights in seen:
        np.add.at(hard[layer], ids.flatten().numpy(), 1)
        np.add.at(soft[layer], ids.flatten().numpy(), weights.flatten().numpy())
    assert (usage.hard == hard).all()
    np.testing.assert_allclose(usage.soft, soft, rtol=1e-3)


def test_reap_is_weight_times_the_norm_of_the_output(folder):
    counting, seen = Counting(Source(folder)), []
    forward = counting.forward

    def watching(layer, x, ids, weights):
        seen.append((layer, x.float(), ids, weights.float()))
        return forward(layer, x, ids, weights)
    counting.forward = watching
    logits(counting.model)
    layer, x, ids, weights = seen[1]
    gate, up, down = stored_experts(folder, 1)
    expert = int(ids.flatten().mode().values)
    token, place = (ids == expert).nonzero(as_tuple=True)
    y = layer.whole(x[token], layer.join(gate[expert].T, up[expert].T).T, down[expert], expert)
    wanted = (weights[token, place] * y.norm(dim=1)).mean()
    assert counting.usage().reap[1, expert] == pytest.approx(float(wanted), rel=1e-4)


def test_a_trace_counts_the_same_way_and_fills_the_pins():
    trace = a_trace(3)
    usage = of_trace(trace)
    assert usage.reap is None and int(usage.hard.sum()) == trace.experts.size
    assert usage.hard[1, 2] == (trace.experts[:, 1] == 2).sum()
    pins = [*usage.pins()]
    assert sorted(pins) == [tuple(pair) for pair in np.argwhere(usage.hard)]
    found = [usage.hard[pair] for pair in pins]
    assert found == sorted(found, reverse=True)
    assert usage.coverage(1) == 1 and usage.coverage(0.5) >= 0.5
    fields = ElementTree.fromstring(heat_map(usage)).iter("{http://www.w3.org/2000/svg}rect")
    assert len([*fields]) == (usage.hard > 0).sum()


def test_a_merge_is_the_mean_by_use_and_every_expert_is_in_one_group(folder):
    source, hard = Source(folder), np.array([[6, 2, 4, 0], [0, 0, 6, 6]])
    usage = Usage(6, 2, hard, hard.astype(float))
    mixture = merged(usage, np.array(KEPT), alike(source.rows()))
    assert torch.equal(mixture.router, masked(KEPT, EXPERTS).router)
    torch.testing.assert_close(mixture.experts.sum(2), torch.ones(LAYERS, 2))
    groups = (mixture.experts > 0).sum(1)
    assert (groups <= 1).all() and groups[0].tolist() == [1, 1, 1, 0], "what was never used has no say"
    gate = stored_experts(folder, 0)[0]
    wanted = torch.einsum("e,eih->ih", mixture.experts[0, 0], gate)
    torch.testing.assert_close(matrices_of(source, mixture, 0, 0)[0], wanted)


def test_a_specialist_is_a_folder_like_any_other(folder, text, tmp_path):
    choice, said = Choice(text, text, n_tokens=2000), []
    manifest = specialise(folder, tmp_path / "made", choice, lambda progress: said.append(progress.text))
    assert Manifest.load(tmp_path / "made") == manifest and manifest.experts == 2 and said
    note = manifest.calibration[NOTE]
    assert (note["of"], note["experts"], note["way"]) == (folder.name, EXPERTS, "mask")
    source = Source(folder)
    counting = Counting(source)
    examples = examples_of(text, load(folder, Options("exact", device="cpu")).tokenizer, 2000)
    loss(counting, examples.fitted)
    kept = counting.usage().best(2, "reap")
    for layer in range(LAYERS):
        own, its = (ExpertsFile(at / experts_name(layer)).blobs for at in (folder, tmp_path / "made"))
        assert torch.equal(its, own[kept[layer]]), "what stays as it is keeps its bytes"
    model = MixedModel(source, 2)
    model.take(masked(kept, EXPERTS))
    torch.testing.assert_close(of_folder(tmp_path / "made"), logits(model.model), rtol=0, atol=2e-3)
    assert note["held_out"] == pytest.approx(np.exp(loss(model, examples.held_out)), rel=1e-4)
    written = card(tmp_path / "made", manifest, "me/special")
    assert f"2 of its {EXPERTS} experts" in written and f"{note['general_before']:.3f}" in written


def test_a_search_that_was_stopped_goes_on_to_the_same_folder(folder, text, tmp_path):
    choice, calls = Choice(text, text, way="search", rounds=4, n_tokens=2000), []

    def stop_late():
        calls.append(0)
        if (tmp_path / "stopped" / experts_name(0)).is_file():
            raise Stopped
    with pytest.raises(Stopped):
        specialise(folder, tmp_path / "stopped", choice, check=stop_late)
    assert (tmp_path / "stopped" / SEARCHED).is_file()
    first = specialise(folder, tmp_path / "stopped", choice)
    whole = specialise(folder, tmp_path / "whole", choice)
    assert {entry.path: entry.sha256 for entry in first.files} == {e.path: e.sha256 for e in whole.files}
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == sorted(
        path.name for path in (tmp_path / "stopped").iterdir())
    assert of_folder(tmp_path / "whole").isfinite().all()
    with pytest.raises(UserError, match="already holds a compressed model"):
        specialise(folder, tmp_path / "whole", choice)


def test_a_search_never_loses_more_than_what_it_begins_with_and_goes_on_where_it_was(tmp_path):
    """Against a loss that is known: how far both matrices are from ones that somebody has in mind."""
    aim = masked([[1, 3, 4], [0, 2, 5]], 6)
    aim = Mixture(aim.experts + 0.05, aim.router)

    def score(mixture: Mixture) -> float:
        return float((mixture.experts - aim.experts).square().sum() + (mixture.router - aim.router).square().sum())
    start = np.array([[0, 1, 2], [0, 1, 2]])
    found = search([start], 6, 90, score, tmp_path / "whole.npz")
    assert score(found) < score(masked(start, 6)) / 2
    assert not torch.equal(found.experts, found.experts.round()), "it also mixes"
    seen = []

    def stopping(mixture: Mixture) -> float:
        seen.append(mixture)
        if len(seen) == 40:
            raise Stopped
        return score(mixture)
    with pytest.raises(Stopped):
        search([start], 6, 90, stopping, tmp_path / "parts.npz")
    again = search([start], 6, 90, score, tmp_path / "parts.npz")
    assert torch.equal(again.experts, found.experts) and torch.equal(again.router, found.router)
    for kept in (mixture.experts.argmax(2) for mixture in seen[:30]):
        assert all(len(set(row)) == 3 for row in kept.tolist()), "no expert twice while it prunes"


def test_what_cannot_be_made_is_refused_before_anything_is_written(folder, text, tmp_path):
    def refused(said: str, of: Path = folder, **choice) -> None:
        with pytest.raises(UserError, match=said):
            specialise(of, tmp_path / "none", Choice(**dict(text=text, general=text, n_tokens=500) | choice))
        assert not (tmp_path / "none").exists()
    refused("choose --keep between 0.50 and 0.75", keep=0.2)
    refused("more than 0, less than 1", keep=1.0)
    refused("at least, and .* gives", way="search")
    little = tmp_path / "little.txt"
    little.write_text("w3 w4 w5")
    refused("too little to fit", text=little)


def test_a_router_of_groups_is_refused(tmp_path):
    with pytest.raises(UserError, match="chooses among groups of experts"):
        Source(compressed("deepseek_v3", tmp_path)[2])
