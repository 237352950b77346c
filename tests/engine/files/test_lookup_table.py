"""Mixture of Lookup Experts: the training form's logits are the table's; rows lie where they should; one row a token is
read; and a folder that is cut, killed or asked for what it has not."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import engine.hf  # noqa: F401  registers the folder's kind
from engine import Engine
from engine.core import Options, UserError
from engine.experts.policy_hook import choose_policies
from engine.files.checkpoint import Checkpoint
from engine.files.lookup import table
from engine.files.lookup.modeling import MoleConfig, MoleForCausalLM
from engine.files.manifest import TABLE, Manifest
from engine.files.skeleton import read_config, spec_of_folder
from engine.files.tensor_source import SafetensorsFolder
from engine.library.compress import Text, compress
from engine.library.publish import card
from engine.model import load, placement
from tests.engine.experts.test_far_locked import Ledger
from tests.support.small_model import TOKENIZER_FILES

LAYERS, EXPERTS, NEURONS, HIDDEN, VOCABULARY = 3, 3, 128, 64, 97
ROW_BYTES = LAYERS * EXPERTS * HIDDEN * 2


def training_form(folder, vocabulary=VOCABULARY, tokenizer_from=None):
    """-> a checkpoint as it is published, under Llama's name."""
    torch.manual_seed(0)
    config = MoleConfig(vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
                        num_attention_heads=4, num_key_value_heads=2, num_experts=EXPERTS, max_position_embeddings=512,
                        initializer_range=0.1, tie_word_embeddings=False)
    weights = {name: p.detach().clone() for name, p in MoleForCausalLM(config).named_parameters()}
    for layer in range(LAYERS):
        weights[f"model.layers.{layer}.expert_layernorm.weight"] = torch.rand(HIDDEN) + 0.5
        for expert in range(EXPERTS):
            for part, shape in (("up", (NEURONS, HIDDEN)), ("down", (HIDDEN, NEURONS))):
                name = f"model.layers.{layer}.experts.{expert}.{part}_proj.weight"
                weights[name] = torch.randn(shape) / shape[1] ** 0.5
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    written = config.to_dict() | {"model_type": "llama", "architectures": ["MoleForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(written, default=str))
    for name in TOKENIZER_FILES if tokenizer_from else ():
        shutil.copyfile(tokenizer_from / name, folder / name)
    return folder


def oracle(folder) -> nn.Module:
    """The training form itself: every expert computed from the token's embedding, in float32."""
    written, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    config = MoleConfig.from_dict(written)
    model = MoleForCausalLM(config).eval()
    _, unused = model.load_state_dict(weights, strict=False)
    assert all("expert" in name for name in unused)

    def computed(layer: int):
        def forward(x, tokens, router):
            norm = weights[f"model.layers.{layer}.expert_layernorm.weight"]
            e = weights["model.embed_tokens.weight"][tokens]
            e = norm * (e * torch.rsqrt(e.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps))
            name = f"model.layers.{layer}.experts.{{}}.{{}}_proj.weight"
            done = [F.linear(nn.GELU()(F.linear(e, weights[name.format(j, "up")])), weights[name.format(j, "down")])
                    for j in range(EXPERTS)]
            return (torch.stack(done, 1) * router[..., None]).sum(1)
        return forward
    for index, layer in enumerate(model.model.layers):
        layer.experts.forward = computed(index)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("mole")
    source = training_form(place / "published")
    compress(source, place / "made")
    return source, place / "made"


@torch.inference_mode()
def test_the_training_forms_logits_are_the_tables(folders, monkeypatch):
    source, made = folders
    with monkeypatch.context() as patch:  # but for its rounding, which the next test has
        patch.setattr(table, "ROW_TYPE", torch.float32)
        exact = table.block(Checkpoint(read_config(source), SafetensorsFolder(source)), range(VOCABULARY))
    model, reference = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval(), oracle(source)
    model.floe._read = lambda tokens: exact[tokens]
    for ids in (torch.arange(VOCABULARY)[None], torch.arange(VOCABULARY)[:, None], torch.arange(8).view(2, 4)):
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-5, atol=2e-5)


@torch.inference_mode()
def test_rows_are_16_bits_and_lie_at_their_tokens_number(folders):
    source, made = folders
    manifest, weights = Manifest.load(made), load_file(source / "model.safetensors")
    assert manifest.has_table and manifest.format_version == 3 and manifest.top_k == EXPERTS
    rows = table.open_table(made, manifest)
    assert rows.shape == (VOCABULARY, LAYERS * EXPERTS * HIDDEN) and rows.dtype == torch.float16
    assert rows[5].data_ptr() - rows.data_ptr() == 5 * ROW_BYTES
    x = F.rms_norm(weights["model.embed_tokens.weight"], (HIDDEN,), weights["model.layers.1.expert_layernorm.weight"],
                   1e-6)
    up, down = (weights[f"model.layers.1.experts.2.{part}_proj.weight"] for part in ("up", "down"))
    wanted = F.linear(F.gelu(F.linear(x, up)), down)
    found = rows.view(VOCABULARY, LAYERS, EXPERTS, HIDDEN)[:, 1, 2].float()
    normal = wanted.abs() >= torch.finfo(torch.float16).tiny
    assert ((found - wanted).abs() / wanted.abs())[normal].max() <= 2 ** -11 * 1.001


@torch.inference_mode()
def test_a_token_reads_one_row_and_a_prompt_one_for_each(folders):
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    whole = model(ids).logits
    assert model.floe.prefill_far_bytes == 20 * ROW_BYTES and model.floe.counters().far_bytes == 0
    state, last = None, []
    for n in range(20):
        out = model(ids[:, n:n + 1], past_key_values=state, use_cache=True)
        state, last = out.past_key_values, [*last, out.logits]
    counters = model.floe.counters()
    assert counters.needed_bytes == counters.far_bytes == 20 * ROW_BYTES and counters.hit_bytes == 0
    torch.testing.assert_close(torch.cat(last, 1), whole, rtol=1e-4, atol=1e-4)
    assert model.floe.activity() == [[1.0] * EXPERTS] * LAYERS


@torch.inference_mode()
def test_beside_a_card_rows_come_out_of_locked_memory(folders):
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32).eval()
    ids, ledger = torch.tensor([[3, 96, 0, 41]]), Ledger()
    before = model(ids).logits
    far, planner = load.blobs_of(model)
    runtime = placement.table_beside_gpu(model, far, planner, "exact", planner.near_bytes("exact"), ledger, "cpu")
    assert sum(ledger.registered.values()) == VOCABULARY * ROW_BYTES and not runtime.reason
    assert torch.equal(model(ids).logits, before)
    runtime.close()
    assert not ledger.registered


def test_the_plan_counts_a_row_a_token(folders):
    source, made = folders
    published, spec = spec_of_folder(source, "m"), spec_of_folder(made, "m")
    assert published == spec and spec.table_bytes == VOCABULARY * ROW_BYTES and spec.token_table_bytes == ROW_BYTES
    weights = load_file(source / "model.safetensors")
    assert spec.trunk_params == sum(w.numel() for name, w in weights.items() if "expert" not in name)
    model = AutoModelForCausalLM.from_pretrained(made)
    plan = load.blobs_of(model)[1].plan(None)
    assert plan.level == "exact" and [level for level, *_ in plan.levels] == ["exact"]
    assert plan.far_bytes_per_token == ROW_BYTES and plan.hit_rate == 0 and plan.near_bytes == EXPERTS * HIDDEN * 2
    assert plan.disk_bytes >= VOCABULARY * ROW_BYTES


def test_it_answers(tmp_path, demo_checkpoint):
    source = training_form(tmp_path / "published", 4096, demo_checkpoint)
    compress(source, tmp_path / "made", trunk_bits=8)
    with Engine.open(tmp_path / "made", Options(device="cpu")) as engine:
        events = list(engine.chat([{"role": "user", "content": "Hello there"}]))
    assert events[-1].kind == "end" and events[-1].reason in ("stop", "length") and events[-1].n_tokens > 1
    assert events[-1].counters.far_bytes >= (events[-1].n_tokens - 1) * ROW_BYTES


KILLED = """
import os, sys
from pathlib import Path
from engine.files.checkpoint import Checkpoint
from engine.files.lookup import table
from engine.library.compress import compress
table.BLOCK_BYTES = 8192
left, plain = int(sys.argv[3]), table.block
def block(*given):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return plain(*given)
import engine.library.compress as module
module.block = block
compress(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("blocks", [0, 1, 7])
def test_killed_it_goes_on_and_ends_in_the_same_bytes(blocks, folders, tmp_path, monkeypatch):
    source = folders[0]
    monkeypatch.setattr(table, "BLOCK_BYTES", 8192)
    compress(source, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, source, tmp_path / "killed", str(blocks)]
    assert subprocess.run(command).returncode == 9
    compress(source, tmp_path / "killed")
    assert (tmp_path / "killed" / TABLE).read_bytes() == (tmp_path / "whole" / TABLE).read_bytes()
    assert Manifest.load(tmp_path / "killed").files == Manifest.load(tmp_path / "whole").files


@pytest.mark.parametrize("spoil, sentence", [
    (lambda w: w.pop("model.layers.2.experts.1.down_proj.weight"), "incomplete: 1 tensors are missing"),
    (lambda w: w.pop("model.layers.0.expert_layernorm.weight"), "the first is model.layers.0.expert_layernorm"),
    (lambda w: w.pop("model.layers.0.router.weight"), "incomplete"),
    (lambda w: w.update({"model.layers.0.experts.0.up_proj.weight": torch.zeros(NEURONS, HIDDEN // 2)}),
     "config and weights do not belong together"),
    (lambda w: w["model.layers.1.experts.0.down_proj.weight"].fill_(1e6), "16 bits do not hold")])
def test_what_is_not_whole_is_refused(spoil, sentence, folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "spoilt")
    weights = load_file(tmp_path / "spoilt" / "model.safetensors")
    spoil(weights)
    save_file(weights, tmp_path / "spoilt" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        compress(tmp_path / "spoilt", tmp_path / "made")


def test_what_a_table_has_not_is_told_in_a_sentence(folders, tmp_path, demo_checkpoint, repository):
    made, text = folders[1], repository / "assets" / "texts" / "calibration.jsonl"
    published = training_form(tmp_path / "published", 4096, demo_checkpoint)
    with pytest.raises(UserError, match="leave the text out"):
        compress(published, tmp_path / "other", text=Text((text,), 100))
    with pytest.raises(UserError, match="training form; make its table first"):
        load.load(published, Options(device="cpu"))
    compress(published, tmp_path / "answers")
    for verb, *rest in (["calibrate", "--text", text], ["trace", "--prompts", text, "--out", tmp_path / "trace"],
                        ["specialise", tmp_path / "half", "--text", text], ["bench", "--compare"],
                        ["bench", "--compare-llama-cpp", "--device", "cpu"]):
        command = [sys.executable, "-m", "engine", verb, tmp_path / "answers", *rest]
        asked = subprocess.run(command, capture_output=True, text=True)
        assert asked.returncode == 2 and "in place of experts" in asked.stderr, asked.stderr
    with Engine.open(tmp_path / "answers", Options(device="cpu", policies="evict=lfu")) as engine:
        assert "in place of experts" in engine.snapshot()["note"]       # a wish of the last start keeps nothing shut
        assert engine.snapshot()["far_total_bytes"] == 4096 * ROW_BYTES
    loaded = load.load(tmp_path / "answers", Options(device="cpu", near_bytes=10_000_000))
    assert loaded.runtime.near_bytes == 0 and loaded.runtime.residency() == [0.0] * LAYERS
    for policies in ("evict=lfu", "fidelity=base"):
        with pytest.raises(UserError, match="in place of experts"):
            choose_policies(loaded.runtime, loaded.model, policies)
    with pytest.raises(UserError, match="no level but exact"):
        loaded.planner.plan("balanced")
    told = card(tmp_path / "answers", Manifest.load(tmp_path / "answers"), "somebody/model")
    assert "kept as a table" in told and "nothing in a table" in told
    loaded.model.floe_spec = replace(loaded.spec, vocabulary=VOCABULARY + 1)
    with pytest.raises(UserError, match="of different models"):
        load.blobs_of(loaded.model)
    with (made / TABLE).open("r+b") as file:
        saved = file.read()
        header = saved.replace(b'"rows.0"', b'"rows.1"')
        file.seek(0)
        file.write(header)
    try:
        with pytest.raises(UserError, match="table.safetensors is damaged"):
            table.open_table(made, Manifest.load(made))
    finally:
        (made / TABLE).write_bytes(saved)
