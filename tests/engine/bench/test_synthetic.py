"""Synthetic models: real names and shapes, made-up weights, made-up habits; they open and run like any other."""
from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from engine.__main__ import main
from engine.bench import blobs, synthetic, synthetic_model
from engine.bench.throughput import Bench, Sizes
from engine.core import Options, UserError
from engine.experts.device import DeviceRuntime
from engine.library import catalogue
from engine.model import load
from engine.model.host_embedding import HostEmbedding
from kernels import dispatch
from kernels.layout import Layout
from kernels.planes import decode_down, decode_gate, decode_sketch, decode_up
from tests.engine.experts.test_far_locked import Ledger
from tests.support.architectures import COMMON, SMALL

NAMED = ["qwen3.6-35b-a3b", "qwen3-30b-a3b", "gpt-oss-20b", "gemma-4-26b-a4b", "mixtral-8x7b"]
TINY = {"qwen3.6-35b-a3b": "qwen3_5_moe_text", "qwen3-30b-a3b": "qwen3_moe", "gpt-oss-20b": "gpt_oss",
        "gemma-4-26b-a4b": "gemma4_text", "mixtral-8x7b": "mixtral"}


def tiny(name: str) -> catalogue.Entry:
    """The catalogue's entry with the small configuration of its architecture; ids of the demo's tokenizer fit."""
    config = COMMON | SMALL[TINY[name]] | {"model_type": TINY[name], "vocab_size": 8192}
    return replace(catalogue.entries()[name], config=config)


@pytest.mark.parametrize("name", NAMED)
def test_shapes_are_the_catalogues(name):
    entry = catalogue.entries()[name]
    shape = synthetic.shape_of(entry, 1)
    full = entry.spec
    assert (shape.spec.experts, shape.spec.neurons, shape.spec.hidden, shape.spec.top_k, shape.spec.vocabulary) == (
        full.experts, full.neurons, full.hidden, full.top_k, full.vocabulary)
    assert shape.spec.layers == 1 and synthetic.shape_of(entry).spec.layers == full.layers
    with pytest.raises(UserError, match=f"{full.decoder_layers} layers"):
        synthetic.shape_of(entry, full.decoder_layers + 1)


@pytest.mark.parametrize("name", NAMED)
@torch.no_grad()
def test_a_folder_opens_and_runs_like_any_other(name, tmp_path):
    for trunk_bits in (4, 16):
        folder = tmp_path / str(trunk_bits)
        folder.mkdir()
        synthetic.write(synthetic.shape_of(tiny(name)), folder, trunk_bits)
        loaded = load.load(folder, Options("exact", device="cpu"))
        assert loaded.runtime.levels == ("exact", "quality", "balanced", "fast")
        for level in ("exact", "fast"):
            loaded.runtime.set_level(level)
            out = loaded.model(torch.arange(3, 20)[None], use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            logits = loaded.model(token, past_key_values=out.past_key_values).logits
            assert logits.isfinite().all() and 0.01 < float(logits.std()) < 1000
    with pytest.raises(UserError, match="already holds a compressed model"):
        synthetic.write(synthetic.shape_of(tiny(name)), folder)


def test_the_verb_writes_and_measures_and_says_synthetic(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "find", lambda text: tiny(text) if text in TINY else None)
    folder = tmp_path / "made"
    folder.mkdir()
    assert main(["synth", "gpt-oss-20b", str(folder), "--layers", "1", "--json", "--repeat", "0.9"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["synthetic"] is True and document["layers"] == 1 and "synthetic" in said.err
    loaded = load.load(folder, Options("fast", device="cpu"))
    found = Bench(loaded, sizes=Sizes(6, 6)).document()
    assert found["synthetic"] is True and found["decode_tokens_per_second"] > 0
    assert main(["synth", "qwen3-30b-a3b", "--in-memory", "--layers", "1", "--json", "--device", "cpu",
                 "--level", "fast"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["synthetic"] is True and document["level"] == "fast" and document["hit_rate"] > 0
    assert main(["synth", "llama", "--in-memory"]) == 2 and "choose one of" in capsys.readouterr().err
    assert main(["synth", "gpt-oss-20b"]) == 2 and "--in-memory" in capsys.readouterr().err
    assert main(["synth", "gpt-oss-20b", "--in-memory", "--repeat", "2"]) == 2
    capsys.readouterr()
    if not torch.cuda.is_available():
        assert main(["synth", "qwen3-30b-a3b", "--in-memory", "--layers", "1", "--device", "cuda"]) == 3
        assert capsys.readouterr().err.strip().endswith("choose the processor.")


@pytest.mark.parametrize("near_bytes", [None, 100_000])
def test_times_are_of_what_people_get_and_bytes_of_the_made_up_picks(near_bytes, tmp_path):
    """Where all lies in the map no hook is there while time is taken; with less near memory the picks decide."""
    synthetic.write(synthetic.shape_of(tiny("qwen3-30b-a3b")), tmp_path)
    loaded, hooks = load.load(tmp_path, Options("exact", near_bytes, device="cpu")), []
    bench, runtime = Bench(loaded, sizes=Sizes(6, 6)), loaded.runtime
    answer, random = bench._answer, bench._random
    bench._answer = lambda prompt: hooks.append(runtime.hook) or answer(prompt)
    bench._random = lambda: hooks.append(runtime.hook) or random()
    document, picks = bench.document(), bench._picks
    assert document["needed_bytes_per_token"] == runtime.far.layers * runtime.top_k * runtime.far.expert_bytes
    if runtime.is_mapped:
        assert hooks == [picks, None, None, None, picks, picks, None, None] and document["hit_rate"] > 0
        in_one_call = bench.decoder.prefix.fused.in_one_call(bench.decoder.prefix._cache)
        assert in_one_call == (not dispatch.why_not_compiled())
    else:
        assert set(hooks) == {picks} and document["hit_rate"] < 1


def test_a_device_computes_experts_made_up_in_locked_memory():
    """With a ledger in the driver's place; the memory goes back when the model is closed."""
    shape, ledger = synthetic.shape_of(tiny("qwen3-30b-a3b")), Ledger()
    calibration = synthetic.calibration_of(shape)
    loaded = synthetic_model.open_on_gpu(shape, calibration, Options("fast", 100_000), ledger, device="cpu")
    embedding = loaded.model.get_input_embeddings()
    assert isinstance(embedding, HostEmbedding)
    assert sum(ledger.registered.values()) == synthetic.bytes_of(shape) + embedding.memory.n_bytes
    assert isinstance(loaded.runtime, DeviceRuntime) and loaded.runtime.near_bytes <= 100_000
    found = Bench(loaded, sizes=Sizes(6, 6)).document()
    assert found["synthetic"] is True and found["level"] == "fast" and found["far_bytes_per_token"] > 0
    loaded.runtime.close()
    assert not ledger.registered


@pytest.mark.parametrize("layout", [Layout(256, 40, 64), Layout(2880, 16, 64), Layout(2048, 8, 128)])
def test_random_blobs_decode_to_weights_of_the_right_size(layout):
    blob = torch.empty(layout.blob_bytes, dtype=torch.uint8)
    blobs.Blobs(layout, 0.0, seed=1).fill(blob)
    sketch = blob[:layout.neurons * layout.sketch_row].view(layout.neurons, -1)
    records = blob[layout.sketch_bytes:].view(layout.neurons, -1)
    coarse = decode_sketch(sketch, layout)
    fine = decode_gate(sketch, records, layout), decode_up(sketch, records, layout)
    for matrix in (*fine, decode_down(records, layout)):
        assert matrix.isfinite().all() and abs(float(matrix.std()) * layout.hidden ** 0.5 - 1) < 0.1
        assert abs(float(matrix.mean())) * layout.hidden ** 0.5 < 0.1
    for two, four in zip(coarse, fine, strict=True):  # the sketch is the coarse half of the same codes
        assert float((two - four).square().mean() / four.square().mean()) < 0.1


def test_neurons_repeat_as_ordered():
    assert synthetic.spread_for(0.3, 0.3) < 0.2
    spreads = [synthetic.spread_for(rate, 0.3) for rate in (0.4, 0.6, 0.8)]
    assert spreads == sorted(spreads) and spreads[0] > 0.1


@pytest.mark.parametrize("repeat", [0.0, 0.42, 0.9, 1.0])
def test_picks_repeat_as_ordered(repeat):
    found = synthetic_model.picks(3, 32, 4, repeat, 400)
    assert found.shape == (400, 3, 4) and int(found.min()) >= 0 and int(found.max()) < 32
    assert bool((found.sort(-1).values.diff(dim=-1) > 0).all())  # no expert twice
    again = (found[1:, :, :, None] == found[:-1, :, None]).any(-1).float().mean()
    assert abs(float(again) - repeat) < 0.03


@torch.no_grad()
def test_a_runtime_follows_its_picks(tmp_path):
    synthetic.write(synthetic.shape_of(tiny("qwen3-30b-a3b")), tmp_path)
    used = {}
    for repeat in (0.0, 1.0):
        loaded = load.load(tmp_path, Options("exact", device="cpu"))
        runtime, far = loaded.runtime, loaded.runtime.far
        runtime.predict = False
        runtime.set_level(runtime.level, 3 * runtime.top_k * far.layers * runtime.whole_bytes // 2)
        runtime.hook = synthetic_model.FollowPicks(runtime, repeat)
        out = loaded.model(torch.tensor([[5]]), use_cache=True)
        before = runtime.counters()
        for _ in range(20):
            out = loaded.model(torch.tensor([[7]]), past_key_values=out.past_key_values)
        used[repeat] = runtime.counters() - before
    assert used[1.0].hit_rate == 1.0 and used[0.0].hit_rate < 0.7
