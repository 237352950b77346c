"""calibrate: the allocation against brute force, its errors against sums by hand, and the whole on a small model."""
from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from engine.__main__ import main
from engine.core import PROMISES, Options, UserError
from engine.experts.layer import LevelPlan
from engine.files.compressed import MappedFile
from engine.files.manifest import Manifest, file_entry
from engine.files.skeleton import experts_modules
from engine.library.compress import compress
from engine.library.hub import Stopped
from engine.model import load
from engine.paths import CALIBRATION_LOG
from engine.quality import calibrate
from engine.quality.budgets import LayerTable, OutputErrors, cheapest, edges, record_bytes
from engine.quality.evaluate import evaluate
from engine.quality.loss_probe import MeasurementLog
from engine.quality.sparse_forward import DecodedExperts, Simulation
from engine.quality.texts import read_tokens
from kernels.layout import Layout
from tests.support.architectures import build
from tests.support.folders import checkpoint, write_tokenizer

L, E, K, N = 3, 8, 2, 48
LAYOUT = Layout(64, N, 64)
N_TOKENS = 1200


# --- budgets ---------------------------------------------------------------------------------------------------------
def table(seed: int, counts: tuple[int, ...] = (0, 2, 5, 9)) -> LayerTable:
    """Errors as they are: more kept, less missed; more refined, less missed."""
    draw, n = torch.Generator().manual_seed(seed), len(counts)
    dropped = torch.rand(n, generator=draw, dtype=torch.float64).flip(0).cumsum(0).flip(0) - 0.01
    steps = torch.rand(n, generator=draw, dtype=torch.float64).cumsum(0)
    coarse = (steps[None] - steps[:, None]).clamp_min(0) * 0.5
    return LayerTable(counts, dropped, coarse, 0.3 + seed % 3, 0.1)


@pytest.mark.parametrize("seed", range(6))
def test_no_allocation_of_fewer_bytes_loses_less(seed):
    """Against every combination of pairs of the grid: what `cheapest` picks, no cheaper one matches."""
    tables = [table(3 * seed + i) for i in range(3)]
    pairs = [(r, kept - r) for r in tables[0].edges for kept in tables[0].edges if kept >= r and kept > 0]
    losses = [{pair: t.loss(*pair) for pair in pairs} for t in tables]
    every = [(record_bytes(found, LAYOUT), sum(losses[i][pair] for i, pair in enumerate(found)))
             for found in itertools.product(pairs, repeat=3)]
    least, most = min(loss for _, loss in every), max(loss for _, loss in every)
    previous = math.inf
    for share in (0.02, 0.1, 0.3, 0.6, 1.0):
        target = least + share * (most - least)
        budgets = cheapest(tables, LAYOUT, target)
        n_bytes, loss = record_bytes(budgets, LAYOUT), sum(losses[i][pair] for i, pair in enumerate(budgets))
        assert loss <= target and n_bytes <= previous
        assert not any(b < n_bytes and other <= loss - 1e-12 for b, other in every), "dominated"
        previous = n_bytes
    assert cheapest(tables, LAYOUT, -1.0) == ((9, 0),) * 3, "a loss that cannot be had: everything"


def test_one_neuron_at_least_is_kept_in_every_layer():
    assert cheapest([table(0), table(1)], LAYOUT, 1e9) == ((0, 2), (0, 2))
    assert edges(96)[0] == 0 and edges(96)[-1] == 96 and len(set(edges(4))) == len(edges(4))


# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a model whose neurons are of very different weight, as a trained one's are."""
    base, draw = tmp_path_factory.mktemp("calibrate"), torch.Generator().manual_seed(4)
    model = build("qwen3_moe", num_hidden_layers=L)
    for i, module in enumerate(experts_modules(model, "model").values()):
        with torch.no_grad():
            module.down_proj.mul_(torch.randn(E, 1, N, generator=draw).mul(1.5 + i / 2).exp() * 0.1)
    model.save_pretrained(base / "source")
    write_tokenizer(base / "source")
    compress(base / "source", base / "made", device="cpu")
    return base / "made"


@torch.no_grad()
def test_errors_of_a_layer_are_those_of_its_output(folder):
    """Every pair of the grid by hand: the output with all refined minus the output of the pair, squared."""
    runtime = load.load(folder, Options("exact", device="cpu")).runtime
    errors, decoded, draw = OutputErrors(runtime), DecodedExperts(runtime), torch.Generator().manual_seed(1)
    layer, n_tokens = runtime.layers[1], 5
    x, weights = torch.randn(n_tokens, 64, generator=draw), torch.rand(n_tokens, K, generator=draw)
    ids = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(n_tokens)])
    with runtime.hooked(Simulation(decoded, None, errors.see)):
        whole = runtime.forward(layer, x, ids, weights)

    def output(refined: int, kept: int) -> torch.Tensor:
        pair = ((refined, kept - refined),) * L
        with runtime.hooked(Simulation(decoded, LevelPlan(pair))):
            return runtime.forward(layer, x, ids, weights)
    found = errors.tables()[1]
    assert found.edges == tuple(edges(K * N)) and errors.tokens == [0, n_tokens, 0]
    for i, j in ((3, 7), (0, 5), (7, 7), (10, 24), (24, 24), (0, 24)):
        refined, kept = found.edges[i], found.edges[j]
        dropped = (whole - output(kept, kept)).square().sum() / n_tokens
        coarse = (output(kept, kept) - output(refined, kept)).square().sum() / n_tokens
        assert float(found.dropped[j]) == pytest.approx(float(dropped), rel=1e-3, abs=1e-6)
        assert float(found.coarse[i, j]) == pytest.approx(float(coarse), rel=1e-3, abs=1e-6)


# --- the whole -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Path]:
    """Two texts of 128 words, each with a habit of its own."""
    place, draw, paths = tmp_path_factory.mktemp("texts"), torch.Generator().manual_seed(2), []
    for step in (1, 5):
        documents = []
        for _ in range(40):
            start = int(torch.randint(3, 128, (), generator=draw))
            documents.append(" ".join(f"w{3 + (start + step * i) % 125}" for i in range(24)))
        paths.append(place / f"{step}.txt")
        paths[-1].write_text("\n<|endoftext|>\n".join(documents))
    return paths


@pytest.fixture(scope="module")
def calibrated(folder, texts, tmp_path_factory) -> tuple[Path, dict, list[str]]:
    """A calibrated copy, the document of the command and what it said."""
    made, said = shutil.copytree(folder, tmp_path_factory.mktemp("calibrated") / "made"), []
    found = calibrate.calibrate(made, texts, N_TOKENS, report=said.append, device="cpu")
    return made, found, said


def test_what_is_stored_is_what_a_folder_needs(calibrated, texts):
    made, found, said = calibrated
    manifest = Manifest.load(made)
    assert json.loads(json.dumps(found)) == manifest.calibration
    assert found["texts"] == [path.name for path in texts] and found["reference"] == "exact"
    assert next(e for e in manifest.files if e.path == calibrate.USAGE) == file_entry(made / calibrate.USAGE)
    usage = MappedFile(made / calibrate.USAGE)
    experts, neurons = usage.tensor("experts"), usage.tensor("neurons")
    assert experts.shape == (L, E) and neurons.shape == (L, E, N)
    assert len(set(experts.sum(1).tolist())) == 1 and int(experts[0].sum()) % K == 0
    kept = [sum(pair) for pair in found["levels"]["balanced"]["budgets"]]
    assert neurons.sum((1, 2)).tolist() == [int(experts[0].sum()) // K * n for n in kept]
    assert set(found["miss_curves"]) == {"blob", "sketch", *(f"record:{name}" for name in (*PROMISES, "floe"))}
    loaded = load.load(made, Options("fast", device="cpu"))
    assert loaded.runtime.level == "fast" and loaded.runtime.levels == ("exact", *PROMISES, "floe")
    assert any("layer 2" in line for line in said) and any("level balanced: " in line for line in said)


def test_a_stricter_promise_costs_more_bytes_and_every_layer_has_its_own_budget(calibrated):
    levels = calibrated[1]["levels"]
    pairs = {level: levels[level]["budgets"] for level in PROMISES}
    n_bytes = [levels[level]["record_bytes_per_token"] for level in ("fast", "balanced", "quality")]
    everything = L * K * N * LAYOUT.record
    assert 0 < n_bytes[0] < n_bytes[1] < n_bytes[2] < everything
    assert n_bytes == [record_bytes(pairs[level], LAYOUT) for level in ("fast", "balanced", "quality")]
    assert any(len(set(map(tuple, pair))) > 1 for pair in pairs.values()), "one percentage for all"
    assert any(down_only for pair in pairs.values() for _, down_only in pair)


def test_figures_are_of_text_that_was_held_back(calibrated, texts):
    """The last third of each text's documents, by the live policy, one token a step."""
    made, found, _ = calibrated
    loaded = load.load(made, Options("exact", device="cpu", predict=False))
    pieces = [read_tokens(path, loaded.tokenizer, N_TOKENS // 2, calibrate.LONGEST) for path in texts]
    held = [ids for documents in pieces for ids in documents[-(len(documents) // 3):]]
    levels = ["exact", *PROMISES, "floe"]
    for row in evaluate(loaded, held, levels).levels:
        stored = found["levels"][row.level]
        assert row.perplexity == pytest.approx(stored["perplexity"], rel=2e-3), row.level
        assert row.kl == pytest.approx(stored["kl"], rel=0.05, abs=2e-4), row.level
    assert found["levels"]["exact"]["kl"] < 1e-9 < found["levels"]["quality"]["kl"] < found["levels"]["fast"]["kl"]


def test_floe_asks_for_the_bytes_of_balanced(calibrated, texts):
    made, found, _ = calibrated
    runtime = (loaded := load.load(made, Options("floe", device="cpu", predict=False))).runtime
    documents = [ids for path in texts for ids in read_tokens(path, loaded.tokenizer, 150)]
    kept, n_tokens = [0], sum(map(len, documents))

    def see(seen) -> None:
        kept[0] += int((seen.fidelity >= 0).sum())
    with torch.no_grad(), runtime.hooked(Simulation(DecodedExperts(runtime), runtime.plans["floe"], see)):
        for ids in documents:
            loaded.model(torch.tensor([ids]))
    asked = kept[0] * LAYOUT.record / n_tokens
    assert asked == pytest.approx(found["levels"]["balanced"]["record_bytes_per_token"], rel=0.15)


def test_stopped_again_and_again_it_goes_on_and_ends_as_if_it_had_not_been(folder, calibrated, texts, tmp_path):
    """Measured documents are not read again, not even behind a line that was not finished."""
    made, stops = shutil.copytree(folder, tmp_path / "made"), 0
    read, most = [], []

    def check(n_read: int, skipped: int, whole: int) -> None:
        read[-1], most[:] = n_read, [whole]
        if len(read) < 6 and n_read > whole // 8:  # the beginning is read each time
            raise Stopped
        assert n_read + skipped <= whole
    while True:
        read.append(0)
        try:
            found = calibrate.calibrate(made, texts, N_TOKENS, report=lambda line: None, device="cpu", check=check)
            break
        except Stopped:
            stops += 1
            with (made / CALIBRATION_LOG).open("a", encoding="utf-8") as file:
                file.write('["half a li')
    assert stops == 5 and sum(read) < 1.7 * most[0]
    assert found == calibrated[1]
    assert {path.name for path in made.iterdir()} == {path.name for path in calibrated[0].iterdir()}
    assert (made / calibrate.USAGE).read_bytes() == (calibrated[0] / calibrate.USAGE).read_bytes()


def test_it_can_be_stopped_between_two_experts_of_a_document(folder, texts, tmp_path):
    asked = Counter()

    def check(n_read: int, skipped: int, whole: int) -> None:
        asked[n_read] += 1
        if n_read and asked[n_read] == 3:
            raise Stopped
    with pytest.raises(Stopped):
        calibrate.calibrate(shutil.copytree(folder, tmp_path / "made"), texts, N_TOKENS, report=lambda line: None,
                            device="cpu", check=check)


def test_the_command_and_a_reference(folder, calibrated, texts, tmp_path, capfd, monkeypatch):
    """KL is against the reference; a second calibration replaces the first, and one that fails leaves it."""
    made = calibrated[0]
    source = folder.parent / "source"
    arguments = ["calibrate", str(made), "--text", str(texts[0]), "--tokens", "300", "--device", "cpu", "--json"]
    assert main([*arguments, "--reference", str(source)]) == 0
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert out.count("\n") == 1 and document["reference"] == "source" and document["texts"] == [texts[0].name]
    assert document["levels"]["exact"]["kl"] > 1e-4, "4 bits are not the checkpoint"
    before = (made / "floe.json").read_bytes()
    assert json.loads(before)["calibration"] == document
    other = tmp_path / "other"
    checkpoint("qwen3_moe", other, vocab_size=256, num_hidden_layers=1)
    for words, *more in (("vocabulary", "--reference", str(other)), ("needs at least 3", "--tokens", "20"),
                         ("--tokens must", "--tokens", "0"), ("cannot be read", "--text", str(tmp_path / "no.txt"))):
        assert main([*arguments, *more]) == 2
        out, err = capfd.readouterr()
        assert out == "" and words in err.splitlines()[-1] and err.splitlines()[-1].endswith(".")
    assert main(["calibrate", str(source), "--device", "cpu"]) == 2
    assert "holds no compressed model" in capfd.readouterr().err
    monkeypatch.setattr(calibrate, "miss_curve", lambda trace: (_ for _ in ()).throw(UserError("Broken off.")))
    assert main(arguments) == 2
    assert (made / "floe.json").read_bytes() == before


def test_what_was_measured_on_something_else_is_thrown_away(tmp_path):
    log = MeasurementLog(tmp_path, "this")
    log.put((1, 2), 0, 3, (0.1, 1e-300))
    log.put((1, 2), 1, 3, (-0.2, 3.0))
    again = MeasurementLog(tmp_path, "this")
    assert (again.get((1, 2), 0, 3), again.get((1, 2), 1, 3)) == ((0.1, 1e-300), (-0.2, 3.0))
    assert again.get((1, 3), 0, 3) is None
    (written,) = (path for path in tmp_path.iterdir() if path.is_file())
    with open(written, "a") as file:
        file.write("[" * 100_000 + "\n7\n")
    assert MeasurementLog(tmp_path, "this").get((1, 2), 0, 3) == (0.1, 1e-300)
    for subject in ("other", "this"):
        assert MeasurementLog(tmp_path, subject).get((1, 2), 0, 3) is None
