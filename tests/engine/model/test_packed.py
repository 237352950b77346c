"""The trunk stays in its codes: every architecture computes with them what it computes with the decoded matrices."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from engine.core import Options
from engine.files import trunk
from engine.files.compressed import MappedFile
from engine.files.manifest import TRUNK
from engine.model import load, packed
from engine.model.packed import Packed, stored_bytes
from kernels.trunk.linear import decode
from tests.support.architectures import SMALL
from tests.support.folders import compressed, logits_by_steps

NAMES = sorted(SMALL)
ALWAYS = {"qwen3_5_moe_text", "gpt_oss", "deepseek_v3", "gemma4_text", "jamba"}
SOME_SLOW = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
TOKENS = torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(1))
N_PREFILL = 8


@pytest.fixture(autouse=True)
def small_matrices_are_coded(monkeypatch):
    monkeypatch.setattr(trunk, "SMALLEST", 1024)


def opened(folder) -> nn.Module:
    return load.load(folder, Options("exact", device="cpu")).model


def packed_of(model: nn.Module) -> dict[str, Packed]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, Packed)}


def decoded(model: nn.Module) -> nn.Module:
    """The same model with ordinary matrices; what was one matrix is still one."""
    plain = {id(p): nn.Parameter(decode(p.codes, p.scales), requires_grad=False) for p in packed_of(model).values()}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if isinstance(p, Packed):
                setattr(module, name, plain[id(p)])
    return model


@pytest.mark.parametrize("name", SOME_SLOW)
def test_the_logits_are_those_of_the_decoded_trunk(name, tmp_path, monkeypatch):
    """Several tokens at once and one by one; and no architecture asks for a whole matrix."""
    whole = []
    monkeypatch.setattr(packed, "decode", lambda *given: whole.append(given))
    for bits in (8, 4):
        model = opened(compressed(name, tmp_path / str(bits), trunk_bits=bits)[2])
        kept = packed_of(model)
        coded = sum(p.numel() for p in kept.values())
        assert coded > 0.5 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
        assert sum(map(stored_bytes, kept.values())) < 1.04 * coded
        found = logits_by_steps(model, TOKENS, N_PREFILL)
        expected = logits_by_steps(decoded(model), TOKENS, N_PREFILL)
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()     # activations of 16 bits
    assert not whole


def test_several_tiles_are_one_product(tmp_path, monkeypatch):
    model = opened(compressed("gpt_oss", tmp_path, trunk_bits=4)[2])
    expected = model(TOKENS[None]).logits
    monkeypatch.setitem(packed.TILE_BYTES, "cpu", 64 * 4 * 5)  # five rows, and the last tile is short
    found = model(TOKENS[None]).logits
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()     # activations of 16 bits


def test_16_bits_are_ordinary_weights(tmp_path):
    assert not packed_of(opened(compressed("qwen3_moe", tmp_path, trunk_bits=16)[2]))


def test_what_look_ahead_reads_is_decoded_and_what_is_tied_is_one(tmp_path):
    folder = compressed("qwen3_moe", tmp_path, trunk_bits=8, num_experts=16, tie_word_embeddings=True)[2]
    for model in (opened(folder), AutoModelForCausalLM.from_pretrained(folder)):
        kept = packed_of(model)
        assert not any(".mlp.gate." in name for name in kept) and len(kept) == 2 * 4 + 1
        assert model.floe.layers[0].router_weight is not None
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert sum(map(stored_bytes, kept.values())) == sum(
            len(file_tensor) for file_tensor in trunk_bytes_of(folder))


def trunk_bytes_of(folder) -> list[bytes]:
    """Every code and scale of the trunk's file that is not a router's."""
    file = MappedFile(folder / TRUNK)
    return [file.tensor(name).flatten().view(torch.uint8).numpy().tobytes() for name in file.header
            if name.endswith((trunk.CODES, trunk.SCALES)) and ".mlp.gate." not in name]


@torch.no_grad()
def test_copies_casts_and_single_rows(tmp_path):
    model = opened(compressed("olmoe", tmp_path, trunk_bits=4)[2])
    expected, head = model(TOKENS[None]).logits, model.get_output_embeddings()
    plain = decode(head.weight.codes, head.weight.scales)
    assert torch.equal(head.weight[3:5], plain[3:5]) and torch.equal(head.weight.float() @ plain[0], plain @ plain[0])
    twin, x = copy.deepcopy(head), torch.randn(2, 64)
    assert torch.equal(twin(x), head(x)) and twin.weight.codes.data_ptr() != head.weight.codes.data_ptr()
    before = {name: p.codes.clone() for name, p in packed_of(model).items()}
    half = packed_of(model.to(torch.bfloat16))
    assert {p.dtype for p in half.values()} == {torch.bfloat16} == {model.dtype}
    assert all(torch.equal(p.codes, before[name]) for name, p in half.items())
    found = model(TOKENS[None]).logits
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.1 * expected.abs().max()
