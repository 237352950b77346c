"""Every architecture gives transformers' own logits: at `full` from its checkpoint, at `exact` with its 4-bit values.

Nothing is excluded: all architectures of tests/support/architectures.py pass. Those whose experts are biased,
interleaved, transposed, clamped or followed by a norm run at sparse budgets too, where the whole budget must equal
`exact`.
"""
from __future__ import annotations

import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.core import Options, UserError
from engine.experts.layer import LevelPlan
from engine.files.checkpoint import Checkpoint
from engine.files.skeleton import experts_modules
from engine.model import load
from tests.support.architectures import SMALL
from tests.support.folders import checkpoint, compressed, logits_by_steps, put_experts, stored_experts

NAMES = sorted(SMALL)
ALWAYS = {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4_text", "minimax_m3_vl_text", "zaya",
          "longcat_flash"}
SOME_SLOW = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
N_PREFILL, N_STEPS = 9, 5
TOKENS = torch.randint(3, 128, (N_PREFILL + N_STEPS,), generator=torch.Generator().manual_seed(1))


NAMED = {"mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "olmoe", "gpt_oss", "deepseek_v2",
         "deepseek_v3", "glm4_moe", "phimoe", "granitemoe", "ernie4_5_moe", "lfm2_moe", "jamba", "minimax", "dots1",
         "gemma4_text", "hunyuan_v1_moe", "exaone_moe"}


def test_an_older_transformers_may_lack_some_but_not_many():
    assert NAMED <= set(NAMES) and len(NAMES) >= 24


def same(found: torch.Tensor, expected: torch.Tensor, limit: float = 2e-3) -> None:
    """Differences below `limit` of the logits' scale, which itself must be a scale worth the name. Compiled for the
    processor, products take activations of 16 bits: 8e-4 is the most that was seen."""
    scale = expected.abs().max()
    assert scale > 0.1 and torch.isfinite(found).all()
    assert (found - expected).abs().max() < limit * scale


def run(model) -> torch.Tensor:
    return logits_by_steps(model, TOKENS, N_PREFILL)


def expert_bytes_of(model, name: str) -> int:
    """Of one expert, from transformers' own float32 parameters."""
    module = next(iter(experts_modules(model, name).values()))
    return sum(4 * p[0].numel() for _, p in module.named_parameters(recurse=False))


@contextmanager
def identity_picks(model, name: str):
    """-> a list that holds, of every step inside, how many picks are of experts that give back what they are given."""
    found = []

    def seen(module, given):
        if len(given[1]) == 1:
            found.append(int((given[1] >= len(module.down_proj)).sum()))
    handles = [module.register_forward_pre_hook(seen) for module in experts_modules(model, name).values()]
    yield found
    for handle in handles:
        handle.remove()


def count_reads(far, monkeypatch) -> Counter:
    """(layer, expert) -> how often it is read whole, from now on."""
    reads, decode = Counter(), far.decode

    def counting(layer, expert, *rows):
        reads[layer, expert] += 1
        return decode(layer, expert, *rows)

    monkeypatch.setattr(far, "decode", counting)
    return reads


@pytest.mark.parametrize("name", NAMES)
def test_full_is_transformers_with_few_experts_near(name, tmp_path, monkeypatch):
    model = checkpoint(name, tmp_path)
    with identity_picks(model, name) as identities:
        expected = run(model)
    spec = Checkpoint.open(tmp_path).spec
    near_bytes = (spec.top_k + 1) * 3 * spec.neurons * spec.hidden * 4
    loaded = load.load(tmp_path, Options("full", near_bytes=near_bytes, device="cpu", predict=False))
    runtime, size = loaded.runtime, expert_bytes_of(model, name)
    assert runtime.near_bytes <= near_bytes and runtime.far.expert_bytes == size
    for predict in (False, True):
        runtime.predict = predict
        runtime.reset()
        reads, before, prefill = count_reads(runtime.far, monkeypatch), runtime.counters(), runtime.prefill_far_bytes
        same(run(loaded.model), expected)
        counters = runtime.counters() - before
        prefill_bytes = runtime.prefill_far_bytes - prefill
        assert reads.total() * size == counters.far_bytes + counters.speculative_bytes + prefill_bytes
        assert counters.needed_bytes == (N_STEPS * spec.layers * spec.top_k - sum(identities)) * size
        assert counters.needed_bytes == counters.hit_bytes + counters.far_bytes and counters.far_bytes > 0
        assert predict or counters.speculative_bytes == counters.wasted_bytes == 0
        monkeypatch.undo()


@pytest.mark.parametrize("name", SOME_SLOW)
def test_a_byte_flipped_in_a_checkpoint_is_noticed(name, tmp_path):
    checkpoint(name, tmp_path)
    spec = Checkpoint.open(tmp_path).spec
    near_bytes = (spec.top_k + 1) * 3 * spec.neurons * spec.hidden * 4
    loaded = load.load(tmp_path, Options("full", near_bytes=near_bytes, device="cpu"))
    expected = run(loaded.model)
    used = [expert for layer, expert in loaded.runtime.far._first_read if layer == 0]
    path, at = place_of_expert(tmp_path, used[-1])
    flip(path, at)
    loaded.runtime.reset()
    with pytest.raises(UserError, match="changed on disk") as caught:
        run(loaded.model)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    flip(path, at)
    same(run(loaded.model), expected, 1e-6)  # what could not be read was not kept as if it had been


def place_of_expert(folder: Path, expert: int) -> tuple[Path, int]:
    """A byte in the middle of one expert of the first MoE layer."""
    source = Checkpoint.open(folder)
    parameter = source._expert_parameters(source.expert_layers[0])[0]
    keys = source.map.of[parameter].keys
    key, share = (keys[0], (expert + 0.5) / source.spec.experts) if len(keys) == 1 else (keys[expert], 0.5)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    low, high = json.loads(raw[8:8 + n])[key]["data_offsets"]
    return path, 8 + n + low + int(share * (high - low))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", SOME_SLOW)
def test_exact_is_transformers_with_the_4_bit_values(name, tmp_path):
    model, _, made = compressed(name, tmp_path)
    original = run(model)
    for layer, module in enumerate(experts_modules(model, name).values()):
        put_experts(module, *stored_experts(made, layer))
    expected = run(model)
    assert (expected - original).abs().max() > 1e-3 * original.abs().max()  # 4 bits leave a mark: the test can fail
    loaded = load.load(made, Options("exact", device="cpu"))
    same(run(loaded.model), expected)
    same(run(AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)), expected)
    at_every_fidelity(name, model, loaded, made, expected)


def at_every_fidelity(name: str, model, loaded, made: Path, expected: torch.Tensor) -> None:
    """Every neuron refined is `exact`; every neuron down-only is the model with the sketch's gate and up."""
    runtime = loaded.runtime
    n, runtime.phase = runtime.top_k * runtime.far.neurons, "decode"
    runtime.plans["balanced"] = LevelPlan(((n, 0),) * runtime.far.layers)
    runtime.set_level("balanced")
    same(run(loaded.model), expected)
    for layer, module in enumerate(experts_modules(model, name).values()):
        put_experts(module, *stored_experts(made, layer, "sketch"))
    runtime.plans["balanced"] = LevelPlan(((0, n),) * runtime.far.layers)
    runtime.set_level("balanced")
    same(run(loaded.model), run(model))


# Matrices large enough to be quantised; every expert is routed, so that no small difference swaps one for another.
LARGER = dict(hidden_size=256, vocab_size=512, num_hidden_layers=3, num_experts_per_tok=8)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_trunk_is_what_its_codes_say(bits, tmp_path):
    model, _, made = compressed("qwen3_moe", tmp_path, bits, **LARGER)
    for layer, module in enumerate(experts_modules(model, "qwen3_moe").values()):
        put_experts(module, *stored_experts(made, layer))
    with_experts = run(model)
    stored = load_file(made / "trunk.safetensors")
    codes = {key.removesuffix(":codes"): value.dtype for key, value in stored.items() if key.endswith(":codes")}
    if bits == 16:
        assert not codes
    else:
        assert codes["model.embed_tokens.weight"] == codes["lm_head.weight"] == torch.int8
        assert codes["model.layers.0.self_attn.q_proj.weight"] == torch.int8
        assert codes["model.layers.1.self_attn.q_proj.weight"] == (torch.int8 if bits == 8 else torch.uint8)
    model.load_state_dict({name: by_hand(stored, name) for name in codes}, strict=False)
    plain = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    same(run(plain), run(model))
    same(run(plain), with_experts, {16: 2e-3, 8: 0.03, 4: 0.5}[bits])


def by_hand(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Weights from codes and scales, group of 64 by group of 64."""
    codes, scales = stored[name + ":codes"], stored[name + ":scales"].double()
    out = torch.empty(codes.shape[0], codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1), dtype=torch.float64)
    if codes.dtype == torch.uint8:
        values = torch.empty_like(out)
        values[:, 0::2], values[:, 1::2] = codes % 16, codes // 16
    else:
        values = codes.double()
    for group in range(out.shape[1] // 64):
        at = slice(64 * group, 64 * group + 64)
        if codes.dtype == torch.uint8:
            out[:, at] = values[:, at] * scales[:, group, :1] + scales[:, group, 1:]
        else:
            out[:, at] = values[:, at] * scales[:, group, None]
    return out.float()


def test_plain_transformers_generates_from_the_folder(tmp_path):
    model, _, made = compressed("gpt_oss", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(made)
    assert plain.dtype == torch.float32 and len(plain.floe.layers[0].biases) == 3
    found = plain.generate(TOKENS[None], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for layer, module in enumerate(experts_modules(model, "gpt_oss").values()):
        put_experts(module, *stored_experts(made, layer))
    assert found.tolist() == model.generate(TOKENS[None], max_new_tokens=8, min_new_tokens=8, do_sample=False).tolist()
