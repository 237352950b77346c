"""The walk is the model: layer after layer it gives what transformers' own forward gives, for every architecture."""
from __future__ import annotations

import pytest
import torch

from engine.experts.store import FarCheckpoint
from engine.files.checkpoint import Checkpoint
from engine.quality.layer_walk import Walk
from tests.support.architectures import SMALL
from tests.support.folders import checkpoint

DOCUMENTS = [torch.arange(3, 23)[None], torch.arange(60, 40, -1)[None], torch.arange(7, 12)[None]]


class Originals:
    """The experts of the open layer, as the checkpoint has them."""

    def __init__(self, walk: Walk, source: Checkpoint) -> None:
        self.walk, self.source = walk, source

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        layer, out = self.walk.experts, torch.zeros_like(x)
        for e in ids.unique().tolist():
            expert = self.source.read_expert(layer.index, e)
            token, place = (ids == e).nonzero(as_tuple=True)
            y = layer.whole(x[token], layer.join(expert.gate[0].T, expert.up[0].T).T, expert.down[0], e)
            out.index_add_(0, token, y * weights[token, place, None])
        return out


@pytest.mark.parametrize("name", SMALL)
def test_layer_after_layer_as_the_whole_model(name, tmp_path):
    model, given = checkpoint(name, tmp_path), []
    source = Checkpoint.open(tmp_path)
    walk = Walk(source, FarCheckpoint(source), DOCUMENTS, "cpu")
    layers = model.get_submodule(walk.layers)
    layers[-1].register_forward_hook(lambda module, inputs, output: given.append(output))
    with torch.inference_mode():
        for ids in DOCUMENTS:
            model(input_ids=ids, use_cache=False)
    for group in walk.before:
        for parameter, tensor in source.read_group(group).items():
            walk.put(parameter, tensor)
    for n, groups in enumerate(walk.within):
        walk.open(n, {key: tensor for group in groups for key, tensor in source.read_group(group).items()})
        walk.leave(list(walk.send(Originals(walk, source))))
    for found, wanted in zip(walk.known, given, strict=True):
        found, wanted = (out[0] if isinstance(out, tuple) else out for out in (found, wanted))
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)
    assert {name for groups in (walk.before, walk.behind, *walk.within) for group in groups for name in group.targets} \
        == {name for group in source.trunk_groups() for name in group.targets}
