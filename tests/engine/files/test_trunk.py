"""Trunk weights at 16, 8 and 4 bits: which are coded, how well, and that blocks of rows change nothing."""
from __future__ import annotations

import pytest
import torch

from engine.core import UserError
from engine.files.trunk import CODES, SCALES, bits_of, encode
from kernels.trunk.linear import decode

LAYERS = 12


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("name, shape, at8, at4", [
    ("model.layers.5.self_attn.q_proj.weight", (256, 256), 8, 4),
    ("model.layers.0.self_attn.q_proj.weight", (256, 256), 8, 8),           # first layer
    ("model.layers.11.mlp.down_proj.weight", (256, 256), 8, 8),             # last layer
    ("model.layers.5.mlp.gate.weight", (128, 256), 8, 8),                   # router
    ("model.layers.5.block_sparse_moe.router.weight", (128, 256), 8, 8),
    ("model.layers.5.mlp.shared_expert.gate_proj.weight", (256, 256), 8, 4),
    ("model.layers.5.mlp.shared_expert_gate.weight", (1, 256), 16, 16),     # too small
    ("model.embed_tokens.weight", (512, 256), 8, 8),
    ("lm_head.weight", (512, 256), 8, 8),
    ("model.norm.weight", (20000,), 16, 16),
    ("model.layers.5.q_norm.weight", (256, 256), 16, 16),
    ("model.layers.5.self_attn.q_proj.bias", (256, 256), 16, 16),
    ("model.layers.5.conv1d.weight", (256, 1, 256), 16, 16),
    ("model.layers.5.self_attn.q_proj.weight", (256, 250), 16, 16),         # groups of 64 do not divide it
    ("model.layers.5.self_attn.q_proj.weight", (64, 128), 16, 16),          # too small
])
def test_which_tensors_are_coded(name, shape, at8, at4):
    tensor = torch.zeros(shape)
    assert [bits_of(name, tensor, bits, LAYERS) for bits in (16, 8, 4)] == [16, at8, at4]


@pytest.mark.parametrize("bits, limit, stored_bits", [(8, 0.008, 8.25), (4, 0.09, 4.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_comes_back(bits, limit, stored_bits, dtype):
    w = weights(300, 256).to(dtype)
    stored = encode("w", w, bits)
    assert set(stored) == {"w" + CODES, "w" + SCALES}
    assert sum(t.numel() * t.element_size() for t in stored.values()) * 8 == stored_bits * w.numel()
    found = decode(stored["w" + CODES], stored["w" + SCALES])
    assert found.dtype == torch.float32 and found.shape == w.shape
    assert (found - w.float()).norm() < limit * w.float().norm()


def test_16_bits_are_the_tensor_itself():
    w = weights(4, 4).bfloat16()
    assert encode("w", w, 16)["w"] is w


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_of_rows_change_nothing(bits, monkeypatch):
    w = weights(300, 256)
    whole = encode("w", w, bits)
    monkeypatch.setattr("engine.files.trunk.BLOCK", 256 * 7)
    assert all(torch.equal(encode("w", w, bits)[key], value) for key, value in whole.items())


@pytest.mark.parametrize("bits", [8, 4])
def test_odd_weights_stay_finite(bits):
    w = torch.zeros(4, 64)
    w[1], w[2, 3], w[3] = 0.5, 3e4, torch.linspace(-1e9, 1e9, 64)
    stored = encode("w", w, bits)
    found = decode(stored["w" + CODES], stored["w" + SCALES])
    assert torch.isfinite(found).all() and (found[0] == 0).all()
    assert (found[1] - 0.5).abs().max() < 0.003 and abs(float(found[2, 3]) - 3e4) < 200


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_is_refused_by_name(bits):
    w = weights(300, 256)
    w[200, 3] = float("nan")
    with pytest.raises(UserError, match=r"model\.x\.weight contains values that are not finite"):
        encode("model.x.weight", w, bits)
