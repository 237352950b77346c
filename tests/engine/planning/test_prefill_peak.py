"""What a chunk of a prompt takes on a card beside its experts: transformers' own forward at real shapes, on the meta
device, every tensor counted while it lives, against what the plan counts for it."""
from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from engine.bench.synthetic import shape_named
from engine.model.registration import FloeExperts
from engine.model.static_cache import StepCache, forward

CONTEXT = 8192
# The first layers that have one of each kind, and the tokens of a chunk.
CASES = {"qwen3.6-35b-a3b": (4, 2048), "qwen3-next-80b-a3b": (4, 2048), "gemma-4-26b-a4b": (6, 2048),
         "mixtral-8x7b": (1, 2048), "qwen3-30b-a3b": (1, 2048), "glm-4.5-air": (2, 2048), "deepseek-v2-lite": (2, 2048),
         "glm-4.7-flash": (2, 2048), "olmoe-1b-7b": (1, 2048), "gpt-oss-20b": (2, 256)}


class Peak(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still alive, at their most. known: tensors from before."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.bytes, self._live, self._sizes = 0, 0, {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage) -> None:
        key = storage._cdata
        if key not in self._sizes and key not in self._known:
            self._sizes[key] = storage.nbytes()
            self._live += self._sizes[key]
            self.bytes = max(self.bytes, self._live)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def fused(query, key, value, attn_mask=None, **_):
    """A card's attention kernel: its output, and the mask as the numbers that it wants."""
    held = None if attn_mask is None else torch.empty_like(attn_mask, dtype=query.dtype)  # noqa: F841
    return torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_chunk_takes_what_is_planned_for_it(name, monkeypatch):
    layers, chunk = CASES[name]
    shape = shape_named(name, layers)
    model = shape.skeleton.to(torch.bfloat16)
    for path, module in shape.modules.items():
        experts = FloeExperts(module)
        experts.forward = lambda hidden, ids, weights: torch.empty_like(hidden)
        model.set_submodule(path, experts)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: False)  # it asks a value
    cache, ids = StepCache(model.config, CONTEXT, "meta"), torch.zeros(1, chunk, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        forward(model, ids, cache, logits_to_keep=1)
        kept = [tensor for layer in cache.layers for tensor in tree_leaves(list(vars(layer).values()))
                if isinstance(tensor, torch.Tensor)]
        with Peak([*model.parameters(), *model.buffers(), *kept]) as peak:
            forward(model, ids, cache, logits_to_keep=1)
    assert model._supports_sdpa == all(pair <= 3 for _, _, pair in shape.spec.prefill), "attention is eager or is not"
    planned = max(chunk * each + CONTEXT * row + chunk * CONTEXT * pair for each, row, pair in shape.spec.prefill)
    assert 0.85 * planned <= peak.bytes <= 1.15 * planned, (peak.bytes, planned)
