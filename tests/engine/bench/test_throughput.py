"""`bench`: its document, its bytes, and that the comparison compares the same model. No timing is asserted."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.__main__ import main
from engine.bench import stream, throughput
from engine.bench.gpu_kernels import Speeds
from engine.bench.step_profile import gpu_named
from engine.core import Options, UserError
from engine.decode.decoder import DeviceDecoder, HostDecoder
from engine.experts.layer import LevelPlan
from engine.library.compress import compress
from engine.machine import benchmark
from engine.model import load
from tests.engine.experts.on_device import take_over
from tests.support import architectures, small_model

KEYS = {"prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_ms", "hit_rate",
        "far_bytes_per_token", "bound_tokens_per_second", "planned_tokens_per_second", "device", "level", "near_bytes"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> tuple[Path, Path]:
    return small_model.make(tmp_path_factory.mktemp("small"), demo_checkpoint)


def test_the_document(folders) -> None:
    loaded = load.load(folders[1], Options(level="exact", device="cpu", predict=False))
    document = throughput.Bench(loaded).document()
    assert KEYS <= set(document) and json.loads(json.dumps(document)) == document
    assert (document["prefill_tokens"], document["decode_tokens"]) == (192, 64)  # the context is 256
    per_token = small_model.LAYERS * small_model.TOP_K * loaded.runtime.far.layout.blob_bytes
    assert document["needed_bytes_per_token"] == per_token
    assert document["bound_tokens_per_second"] == document["copy_bytes_per_second"] / per_token
    assert document["hit_rate"] == 1 and document["far_bytes_per_token"] == 0  # prefill brought all of them
    assert document["own_text"]["warm"]["far_bytes_per_token"] <= document["own_text"]["cold"]["far_bytes_per_token"]
    assert all(document[key] > 0 for key in KEYS if key.endswith(("_second", "_ms")))


def test_the_plan_stands_beside_what_was_measured(folders, monkeypatch) -> None:
    """The same level, near memory and speeds: a machine twice as fast is expected to be so, whatever this one is."""
    loaded, planned = load.load(folders[1], Options(level="exact", device="cpu")), []
    loaded.runtime.set_level("exact", loaded.runtime.smallest_bytes())
    for factor in (1, 2):
        rates = {name: 1e9 * factor for name in benchmark.RATES} | {"operation_seconds": 1e-6 / factor}
        monkeypatch.setattr(benchmark, "measure", lambda device, rates=rates: rates)
        document = throughput.Bench(loaded, sizes=throughput.Sizes(24, 8)).document()
        planner = replace(loaded.planner, machine=benchmark.apply(loaded.planner.machine, rates))
        wishes = Options(near_bytes=document["near_bytes"], context=2 * 24 + 8)
        assert document["planned_tokens_per_second"] == planner.plan("exact", wishes).decode_tokens_per_second
        planned.append(document["planned_tokens_per_second"])
    assert planned[1] == pytest.approx(2 * planned[0])


def test_near_memory_for_nothing_misses_every_time(folders) -> None:
    loaded = load.load(folders[1], Options(level="exact", device="cpu", predict=False))
    loaded.runtime.set_level(loaded.runtime.level, loaded.runtime.smallest_bytes())
    document = throughput.Bench(loaded, sizes=throughput.Sizes(24, 8)).document()
    assert document["hit_rate"] == 0 and document["far_bytes_per_token"] == document["needed_bytes_per_token"]
    assert document["near_bytes"] == loaded.runtime.near_bytes


def test_a_sparse_level(folders) -> None:
    loaded = load.load(folders[1], Options(level="exact", device="cpu"))
    loaded.runtime.plans["fast"] = LevelPlan(budgets=((7, 4),) * small_model.LAYERS)
    loaded.runtime.set_level("fast", loaded.runtime.everything_bytes() // 2)
    document, layout = throughput.Bench(loaded, sizes=throughput.Sizes(24, 8)).document(), loaded.runtime.far.layout
    records = 7 * layout.record + 4 * layout.prefix
    sketches = small_model.TOP_K * layout.sketch_bytes
    assert document["level"] == "fast"
    assert document["needed_bytes_per_token"] == small_model.LAYERS * (records + sketches)
    assert 0 < document["far_bytes_per_token"] < small_model.LAYERS * records


def test_a_device_is_measured_as_it_is_used(folders, monkeypatch) -> None:
    """Its own step, cache and sampler decode; what it costs is explained behind the document."""
    loaded = load.load(folders[1], Options(level="exact", device="cpu"))
    loaded.runtime.plans["fast"] = LevelPlan(budgets=((7, 4),) * small_model.LAYERS)
    take_over(loaded)
    loaded.runtime.set_level("fast", loaded.runtime.everything_bytes() // 2)
    measured, asked = throughput.Bench(loaded, sizes=throughput.Sizes(24, 8)), []
    tokens = measured.decoder.tokens
    monkeypatch.setattr(measured.decoder, "tokens", lambda *given: asked.append(given[-1]) or tokens(*given))
    document = measured.document()
    assert asked == [2, 2, 2, 8, 8, 8, 8, 8] and json.loads(json.dumps(document)) == document
    layout = loaded.runtime.far.layout
    needed = small_model.LAYERS * (7 * layout.record + 4 * layout.prefix + small_model.TOP_K * layout.sketch_bytes)
    assert document["needed_bytes_per_token"] == needed and 0 < document["hit_rate"] < 1
    assert document["near_bytes"] <= loaded.runtime.everything_bytes() // 2 and document["note"] == ""
    rows = list(measured.rows(Speeds(1e9, 1e8), gpu_named("rtx-4070-12gb")))
    found = {row["measured"]: row for row in rows}
    assert {"bench", "nodes", "outside memory", "projection", "whole experts"} <= set(found)
    assert found["bench"]["tokens_per_second"] == pytest.approx(document["decode_tokens_per_second"])
    assert found["bench"]["needed_bytes_per_token"] == needed and found["projection"]["card"] == "GeForce RTX 4070"
    whole = small_model.LAYERS * small_model.TOP_K * layout.blob_bytes
    assert found["whole experts"]["needed_bytes_per_token"] == whole and found["whole experts"]["level"] == "exact"
    assert loaded.runtime.level == "fast" and json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "phimoe", "granitemoeshared"])
@torch.no_grad()
def test_the_uncompressed_model_computes_what_ours_does(name: str, tmp_path: Path, demo_checkpoint: Path) -> None:
    """Whatever the layout of its experts: transposed, interleaved, biased."""
    architectures.build(name, 0).save_pretrained(tmp_path / "checkpoint")
    for file in small_model.TOKENIZER_FILES:
        (tmp_path / "checkpoint" / file).write_bytes((demo_checkpoint / file).read_bytes())
    compress(tmp_path / "checkpoint", tmp_path / "compressed", device="cpu")
    for folder in (tmp_path / "checkpoint", tmp_path / "compressed"):
        ours = load.load(folder, Options(level="exact", device="cpu"))
        ids = torch.tensor([[5, 9, 17, 3, 88, 41]])
        theirs = throughput.uncompressed(ours)
        expected = theirs(ids).logits
        assert expected.std() > 0
        difference = (ours.model(ids).logits - expected).abs().max()
        assert difference < 1e-3 * expected.abs().max()     # activations of 16 bits


def test_the_comparison_runs_transformers_own(folders) -> None:
    loaded = load.load(folders[1], Options(level="exact", device="cpu"))
    source = load.load(folders[0], Options(level="full", device="cpu"))
    said = []
    rows = throughput.compare(loaded, source, said.append, rounds=2, sizes=throughput.Sizes(16, 4))
    names = [row["implementation"] for row in rows]
    assert names[0] == "floe" and {"eager", "batched_mm", "grouped_mm"} <= set(names)
    assert [row["level"] for row in rows] == ["exact"] + ["uncompressed"] * (len(rows) - 1)
    assert all(row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0 for row in rows)
    assert loaded.runtime.residency() == [1.0] * small_model.LAYERS, "ours is compared with everything near"


def test_a_device_is_compared_by_its_own_step(folders, monkeypatch) -> None:
    loaded = load.load(folders[1], Options(level="exact", device="cpu"))
    take_over(loaded)
    ours, made = [], throughput.decoder_for

    def counted(*given):
        decoder = made(*given)
        tokens = decoder.tokens
        decoder.tokens = lambda *asked: ours.append(type(decoder)) or tokens(*asked)
        return decoder
    monkeypatch.setattr(throughput, "decoder_for", counted)
    rows = throughput.compare(loaded, rounds=1, sizes=throughput.Sizes(16, 4))
    assert rows[0]["implementation"] == "floe" and len(rows) > 1 and ours == [DeviceDecoder] * 2
    n_bytes = small_model.LAYERS * small_model.TOP_K * loaded.runtime.far.layout.blob_bytes
    assert loaded.runtime.counters().needed_bytes == 2 * (4 + 1) * n_bytes  # every token a step of the device


def test_the_stream_stands_beside_the_bare_decoder(folders, monkeypatch) -> None:
    """The same number of tokens either way."""
    loaded, drawn, told = load.load(folders[1], Options(level="exact", device="cpu")), [], []
    tokens, streamed = HostDecoder.tokens, stream._streamed
    monkeypatch.setattr(HostDecoder, "tokens", lambda *given: drawn.append(given[5]) or tokens(*given))
    monkeypatch.setattr(stream, "_streamed", lambda *given: told.append(streamed(*given)) or told[-1])
    found = stream.overhead(loaded, Options(level="exact", device="cpu"), rounds=1, sizes=throughput.Sizes(64, 6))
    assert found["overhead_ms"] == found["streamed_ms"] - found["bare_ms"]
    assert [n for n, _ in told] == drawn[1::2] and len(told) == 2


def test_a_token_is_taken_apart(folders, repository) -> None:
    """Every token has all kinds of work, and afterwards nobody is told of a step."""
    pytest.importorskip("numba", reason="needs numba, which compiles these functions")
    from kernels.cpu.program import Program
    loaded = load.load(folders[1], Options(level="exact", device="cpu"))
    found = stream.parts(loaded, throughput.Sizes(8, 6))
    assert list(found) == ["products", "attention", "rest"] and all(ms > 0 for ms in found.values())
    assert Program.watch is None
    tasks = {line.split("(")[0] for path in (repository / "kernels" / "cpu").rglob("*.py")
             for line in path.read_text(encoding="utf-8").split("@task\ndef ")[1:]}
    assert stream.PRODUCTS | stream.ATTENTION <= tasks


def test_sizes_follow_the_context() -> None:
    assert throughput.Sizes.of(None) == throughput.Sizes.of(4096) == throughput.Sizes(512, 128)
    assert throughput.Sizes.of(640) == throughput.Sizes(512, 128)
    assert throughput.Sizes.of(600) == throughput.Sizes(472, 128)
    assert throughput.Sizes.of(100) == throughput.Sizes(75, 25)
    with pytest.raises(UserError):
        throughput.Sizes.of(3)


def test_the_command(folders, capsys: pytest.CaptureFixture) -> None:
    arguments = ["bench", str(folders[1]), "--level", "exact", "--near-bytes", "40KiB", "--device", "cpu", "--json"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    document = json.loads(out)
    assert out.count("\n") == 1 and KEYS <= set(document) and 0 < document["near_bytes"] <= 40 * 1024
    assert main(["bench", str(folders[1]), "--level", "fast"]) == 2
    assert "cannot run at level fast" in capsys.readouterr().err
    assert main(["bench", str(folders[1]), "--source", str(folders[0])]) == 2
