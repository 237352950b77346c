"""The embedding in page-locked host memory: the same rows, the same model; and when it has to go onto the card."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.core import Options
from engine.files import trunk
from engine.model import load
from engine.model.host_embedding import HostEmbedding, leave_on_host
from tests.engine.experts.test_far_locked import Ledger
from tests.support.folders import compressed

IDS = torch.tensor([[5, 127, 0, 5, 64]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_computes_the_same_with_its_embedding_on_the_host(dtype, tmp_path):
    folder, ledger = compressed("qwen3_moe", tmp_path)[2], Ledger()
    model = load.load(folder, Options("exact", device="cpu")).model.to(dtype)
    plain, rows = model(IDS).logits, model.get_input_embeddings().weight[IDS]
    before = sum(parameter.numel() for parameter in model.parameters())
    memory = leave_on_host(model, ledger)
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert before - sum(parameter.numel() for parameter in model.parameters()) == 128 * 64
    assert sum(ledger.registered.values()) == memory.n_bytes == 128 * 64 * dtype.itemsize
    assert torch.equal(model.get_input_embeddings()(IDS), rows) and torch.equal(model(IDS).logits, plain)
    memory.close()
    assert not ledger.registered


@pytest.mark.parametrize("hidden_size", [64, 192])  # of a row's bytes some are only there for whole 16
@torch.no_grad()
def test_packed_rows_lie_on_the_host_as_they_are(hidden_size, tmp_path, monkeypatch):
    monkeypatch.setattr(trunk, "SMALLEST", 1024)
    folder, ledger = compressed("qwen3_moe", tmp_path, trunk_bits=8, hidden_size=hidden_size)[2], Ledger()
    model = load.load(folder, Options("exact", device="cpu")).model
    plain, rows = model(IDS).logits, model.get_input_embeddings()(IDS)
    memory = leave_on_host(model, ledger)
    assert memory.n_bytes == 128 * (hidden_size + 16)
    assert torch.equal(model.get_input_embeddings()(IDS), rows) and torch.equal(model(IDS).logits, plain)
    memory.close()


def test_weights_that_the_head_shares_stay_with_it(demo_checkpoint):
    model, ledger = load.load(demo_checkpoint, Options("exact", device="cpu")).model, Ledger()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert leave_on_host(model, ledger) is None and not ledger.registered
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_without_locked_memory_it_goes_onto_the_card(tmp_path):
    model = load.load(compressed("qwen3_moe", tmp_path)[2], Options("exact", device="cpu")).model
    ledger = Ledger(limit=0)
    assert leave_on_host(model, ledger) is None and not ledger.registered
    assert type(model.get_input_embeddings()) is nn.Embedding
