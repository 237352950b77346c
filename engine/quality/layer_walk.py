"""A checkpoint's model, walked over texts one decoder layer after the other, with one layer's weights in memory.

The model is transformers' own. A document is sent through the whole of it each time, where the layers that are done
hand on what the last of them gave for this document and the one that is open ends the trip: masks, positions and what
else a model makes beside its layers are its own. Memory: embedding and head, one layer's trunk, the hidden states of
the texts. What the routed experts give is the caller's.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from engine.experts.layer import LayerExperts
from engine.files.checkpoint import Checkpoint
from engine.files.key_map import Group
from engine.model.packed import plain
from engine.model.registration import UnboundConfig, layer_experts
from engine.quality.loss_probe import Documents

Tensor = torch.Tensor
AtExperts = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [T, H], ids [T, k], weights [T, k] -> [T, H]


class Reached(Exception):
    """Ends a trip; `output` is what the open layer gave."""

    def __init__(self, output=None) -> None:
        super().__init__()
        self.output = output


class Walk:
    """layers: the name of their list. at: the one that is open, -1 before the first; experts: of it, None in a dense
    layer; known: what the one before gave for every document. before, behind: the trunk's conversions that the layers
    need, and those that only the logits need; within: of each layer."""

    def __init__(self, checkpoint: Checkpoint, far, documents: Documents, device: str) -> None:
        """far: see `layer_experts`; documents: int64 [1, n] each. Reads no weights: `put` what `before` names, then
        `open` the layers."""
        self.documents, self.device, self._checkpoint, self.at = documents, device, checkpoint, -1
        self._far, self.known = far, [None] * len(documents)
        self.layers = checkpoint.expert_layers[0].partition(".layers.")[0] + ".layers"
        self.model = self._empty_model().eval()
        layers = self.model.get_submodule(self.layers)
        self.within: list[list[Group]] = [[] for _ in layers]
        self.before, self.behind = [], []
        for group in checkpoint.trunk_groups():
            self._part_of(group).append(group)
        for n, layer in enumerate(layers):
            layer.forward = partial(self._pass, n, layer.forward)
        self.model.get_input_embeddings().register_forward_hook(
            lambda module, given, out: out.to(device, torch.float32))

    def _empty_model(self) -> nn.Module:
        """One number stands in place of each tensor."""
        shapes = self._checkpoint.skeleton.state_dict()
        empty = {name: torch.zeros((), dtype=torch.float32 if shapes[name].is_floating_point() else shapes[name].dtype
                                   ).expand(shapes[name].shape)
                 for group in self._checkpoint.trunk_groups() for name in group.targets}
        return type(self._checkpoint.skeleton).from_pretrained(
            None, config=self._checkpoint.text_config, state_dict=empty, dtype=torch.float32,
            quantization_config=UnboundConfig())

    def _part_of(self, group: Group) -> list[Group]:
        """The list that a conversion belongs to."""
        name = group.targets[0]
        if name.startswith(self.layers + "."):
            return self.within[int(name[len(self.layers) + 1:].partition(".")[0])]
        parent = self.model.get_submodule(self.layers.rpartition(".")[0])
        children = list(dict(parent.named_children()))
        last = {f"{self.layers.rpartition('.')[0]}.{child}" for child in children[children.index("layers"):]
                if "norm" in child}
        module = self.model.get_submodule(name.rpartition(".")[0])
        is_behind = module is self.model.get_output_embeddings() or name.rpartition(".")[0] in last
        return self.behind if is_behind else self.before

    # --- one layer ----------------------------------------------------------------------------------------------
    def open(self, n: int, trunk: dict[str, Tensor]) -> None:
        """Layer n, whose predecessor has been left, with these weights."""
        self._give_back()
        self.at, self.experts = n, None
        for name, tensor in trunk.items():
            self.put(name, tensor)
        path = next((path for path in self._checkpoint.expert_layers if path.startswith(f"{self.layers}.{n}.")), None)
        if path:
            module, index = self.model.get_submodule(path), self._checkpoint.expert_layers.index(path)
            self.experts = layer_experts(self.model, path, index, self._far, self.device)
            module.runtime, module.layer = self, self.experts

    def put(self, name: str, value: Tensor) -> None:
        """Another value of a tensor of the trunk. The embedding stays as it comes, packed or of 16 bits: few of its
        rows are looked up, and in float32 it would be the largest tensor of all in memory."""
        parent, _, own = name.rpartition(".")
        module, value = self.model.get_submodule(parent), value.to(self.device)
        if module is not self.model.get_input_embeddings():
            value = plain(value).float() if value.is_floating_point() else value
        if own in module._parameters:
            module._parameters[own] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[own] = value

    def linears(self) -> dict[str, nn.Linear]:
        """The open layer's linear modules by the name of their weight."""
        path = f"{self.layers}.{self.at}"
        return {f"{path}.{name}.weight": module for name, module in self.model.get_submodule(path).named_modules()
                if type(module) is nn.Linear}

    @torch.inference_mode()
    def send(self, at_experts: AtExperts) -> Iterator[object]:
        """Every document through the layer that is open -> what it gives, whatever kind of thing that is."""
        self._at_experts = at_experts
        for number, ids in enumerate(self.documents):
            self._document = number
            try:
                self.model(input_ids=ids, use_cache=False)
            except Reached as reached:
                yield reached.output

    def leave(self, outputs: list) -> None:
        """outputs: of the open layer, as `send` gave them; the next layer begins with them."""
        self.known = outputs

    def _pass(self, n: int, forward: Callable, *given, **named):
        if n < self.at:
            return self.known[self._document]
        raise Reached(forward(*given, **named))

    def forward(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """In place of `Runtime.forward`, of the layer that is open."""
        return self._at_experts(x, ids, weights)

    def _give_back(self) -> None:
        if self.at >= 0:
            for parameter in self.model.get_submodule(f"{self.layers}.{self.at}").parameters():
                parameter.data = torch.zeros((), device=self.device).expand(parameter.shape)
