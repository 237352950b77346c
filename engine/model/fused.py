"""A step of few tokens in some six calls a layer, where transformers' own forward makes some seventy; of one token in
one call (host_token.py), where a processor has all experts in place.

Built from the modules of an open model, whose forward it equals up to rounding, and used in its place while it decodes:
on the processor behind a cache that grows, on a card inside the recorded step, behind one of fixed shape. There the
residual is float32 where transformers' is 16-bit, and nothing is asked of the host. Which architectures have it,
blocks.py knows; every other model runs transformers' forward. The experts are called as there: levels, hooks and near
memory know no difference.

Legend: T tokens, H hidden, E experts, k routed, V words, D of a head.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

from engine.experts.device import DeviceRuntime
from engine.model.blocks import Flanked, block_of, is_known, kinds_of, matrices, norm, rotation_of
from engine.model.growing_cache import GrowingLayer, GrowingWindow
from engine.model.host_token import HostToken
from engine.model.packed import Packed
from engine.model.static_cache import FullLayer, RecurrentLayer, RingLayer, StepCache
from kernels.layout import Layout
from kernels.trunk.attend import Heads
from kernels.trunk.choose import Entrance, Reader, choose
from kernels.trunk.delta import Mixer, delta
from kernels.trunk.gated import gated_linears
from kernels.trunk.head import best_rows
from kernels.trunk.latent import Latent
from kernels.trunk.linear import MOST_TOKENS, columns, dequantize_rows, linears
from kernels.trunk.settle import settle, settled_linears
from kernels.trunk.token import Block

Tensor = torch.Tensor
Rows = GrowingLayer | GrowingWindow | FullLayer | RingLayer | LinearAttentionLayer | RecurrentLayer
Turns = dict[str | None, Tensor]    # by the layers' kind: cosines and sines of positions, float32 [2, T, D]
TURNS = 1024  # positions whose rotation is computed at once


@dataclass(frozen=True)
class Layer:
    """One decoder layer. experts: None where the block chooses none."""

    block: Block
    experts: nn.Module | None

    def __call__(self, x: Tensor, turn: Tensor, cache: Rows) -> Tensor:
        """x float32 [T, H] -> the same."""
        own = self.block
        projected, _ = linears(x, own.projections, own.before.weight, own.before.epsilon)
        x, _ = linears(self._mixed(projected, turn, cache), own.output, None, 0.0, x)
        if own.choice is None:
            return gated_linears(linears(x, own.router, own.between.weight, own.between.epsilon)[0], own.shared, x)
        entrance = Entrance(Reader(own.router, own.between.weight, own.between.epsilon), own.n_experts, own.choice)
        shared, normed, ids, shares, *quantised = choose(x, entrance, _quantises(self.experts))
        if own.shared is not None:
            x = gated_linears(shared, own.shared, x)
        return self.experts(normed, ids, shares, x, tuple(quantised))

    def _mixed(self, projected: Tensor, turn: Tensor, cache: object) -> Tensor:
        mixing = self.block.mixing
        if isinstance(mixing, Heads):
            return cache.attend(projected, turn, mixing)
        if isinstance(mixing, Latent):
            return self._looked_up(projected, turn, cache, mixing)
        if isinstance(cache, RecurrentLayer):
            return cache.mix(projected, mixing)
        return delta(projected, cache.conv_states[0], cache.recurrent_states[0], mixing)

    def _looked_up(self, projected: Tensor, turn: Tensor, cache: GrowingLayer | FullLayer, latent: Latent) -> Tensor:
        """In a cache of rows that all heads share."""
        n_new = latent.rank + latent.turning
        query, new = (part.contiguous() for part in projected.split((projected.shape[1] - n_new, n_new), -1))
        if self.block.queries is not None:
            before, more = self.block.queries
            query, _ = linears(query, more, before.weight, before.epsilon)
        return cache.attend_latent(query, new, turn, latent)


@dataclass(frozen=True)
class FlankedLayer:
    """As Layer."""

    block: Flanked
    experts: nn.Module

    def __call__(self, x: Tensor, turn: Tensor, cache: Rows) -> Tensor:
        """x float32 [T, H] -> the same."""
        own = self.block
        projected, _ = linears(x, own.projections, own.before.weight, own.before.epsilon)
        x, normed = settled_linears(cache.attend(projected, turn, own.mixing), own.output, x, own.settled)
        entrance = Entrance(Reader(own.router, own.routing.weight, own.routing.epsilon), own.router.rows, own.choice,
                            Reader(own.inner, own.inside.weight, own.inside.epsilon))
        inner, _, ids, shares, *quantised = choose(x, entrance, _quantises(self.experts), normed)
        dense = gated_linears(inner, own.back, None, "gelu_tanh")
        return settle(x, dense, own.joined, self.experts(normed, ids, shares, None, tuple(quantised)))[0]


class FusedStep:
    """Of one model; it holds the model's own tensors."""

    def __init__(self, model: nn.Module) -> None:
        base, config = model.model, model.config
        self._embed, self._turned = base.embed_tokens, rotation_of(model)
        self._kinds = kinds_of(model)
        self._layers = [_of_block(block_of(layer, config), layer) for layer in base.layers]
        self._norm, self._head = norm(base.norm), matrices(model.lm_head)
        self._cap = getattr(config, "final_logit_softcapping", None)
        self.n_best: int | Tensor = 0   # how many of the largest logits are asked for, the others may be -inf; 0: all

    def _logits(self, x: Tensor, turns: Turns, cache: Cache) -> Tensor:
        """x float32 [T, H] -> logits float32 [V] after the last token."""
        for layer, kind, rows in zip(self._layers, self._kinds, cache.layers, strict=True):
            x = layer(x, turns[kind], rows)
        x, normed = x[-1:].contiguous(), (self._norm.weight, self._norm.epsilon)
        logits = (best_rows(x, self._head, self.n_best, *normed) if self._head.is_nested else
                  linears(x, self._head, *normed)[0][0])
        return logits if self._cap is None else (logits / self._cap).tanh() * self._cap

    def _all_turned(self, x: Tensor, positions: Tensor) -> Turns:
        return {kind: self._turned(x, positions, kind) for kind in dict.fromkeys(self._kinds)}


class HostStep(FusedStep):
    """On the processor, in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        blocks, experts = ([getattr(layer, part) for layer in self._layers] for part in ("block", "experts"))
        self._turns, self._known = {}, 0     # and how many positions
        turn = self._between(0, 1).get(None)
        self._token = HostToken(blocks, experts, self._norm, self._head, 0 if turn is None else turn.shape[-1])
        self._attends = [isinstance(block.mixing, Mixer) for block in blocks].index(False)

    def takes(self, ids: list[int], cache: DynamicCache) -> bool:
        return len(ids) <= MOST_TOKENS and all(_goes_on(layer) for layer in cache.layers)

    def in_one_call(self, cache: DynamicCache) -> bool:
        """Whether a token behind this cache is one."""
        return self._token.takes(cache)

    def __call__(self, ids: list[int], cache: DynamicCache) -> Tensor:
        """Read up to MOST_TOKENS more tokens behind what the cache holds -> logits [V] after the last."""
        position = cache.layers[self._attends].get_seq_length()
        turns, x = self._between(position, position + len(ids)), self._embedded(ids)
        if len(ids) == 1 and self.in_one_call(cache):
            return self._token(x, turns[None], cache, position, self.n_best)
        return self._logits(x, turns, cache)

    def _embedded(self, ids: list[int]) -> Tensor:
        """Rows [T, H]: of one packed token without the detours of torch's functions, which take some 50 us, unless
        somebody watches what is read."""
        weight, is_plain = self._embed.weight, type(self._embed) is nn.Embedding    # Gemma's scales its rows
        if len(ids) > 1 or not is_plain or not isinstance(weight, Packed) or self._embed._forward_hooks:
            return self._embed(torch.tensor(ids))
        at, row = slice(ids[0], ids[0] + 1), torch.empty(1, columns(weight.codes), dtype=torch.float32)
        dequantize_rows(weight.codes[at], weight.scales[at], row)
        return row

    def _between(self, first: int, end: int) -> Turns:
        if end > self._known:
            self._known = -(-end // TURNS) * TURNS
            self._turns = self._all_turned(torch.empty(0), torch.arange(self._known))
        return {kind: turn[:, first:end].contiguous() for kind, turn in self._turns.items()}


class DeviceStep(FusedStep):
    """Behind a cache of fixed shape; every position is a tensor, so that it can be recorded."""

    def __call__(self, ids: Tensor, cache: StepCache) -> Tensor:
        """Read ids int64 [T], up to MOST_TOKENS, behind what the cache holds -> logits float32 [V] after the last."""
        cache.clock.begin(len(ids))  # what `cache.begin` lends, nobody asks for
        x = self._embed(ids)
        for layer, own in zip(cache.layers, self._layers, strict=True):
            _initialise(layer, own.block.mixing, x)
        x = x.float()
        logits = self._logits(x, self._all_turned(x, cache.clock.positions), cache)
        cache.clock.advance(len(ids))
        return logits


def host_step(model: nn.Module) -> HostStep | None:
    """None for a model that only transformers' own forward computes."""
    is_plain = model.dtype == torch.float32 and model.device.type == "cpu"
    return HostStep(model) if is_plain and is_known(model) else None


def device_step(model: nn.Module, cache: StepCache) -> DeviceStep | None:
    """As `host_step`, behind this cache."""
    is_full = all(type(layer) in (FullLayer, RingLayer, RecurrentLayer) for layer in cache.layers)
    return DeviceStep(model) if is_full and is_known(model) else None


def _of_block(block: Block | Flanked, layer: nn.Module) -> Layer | FlankedLayer:
    if isinstance(block, Flanked):
        return FlankedLayer(block, layer.experts)
    return Layer(block, getattr(layer.mlp, "experts", None))


def _quantises(experts: nn.Module) -> Layout | None:
    """How these experts' runtime wants their activation quantised, if it is a card's."""
    return experts.runtime.quantises if isinstance(experts.runtime, DeviceRuntime) else None


def _goes_on(layer: object) -> bool:
    """Whether few tokens can be read behind what the layer of a growing cache holds."""
    if type(layer) is LinearAttentionLayer:
        return layer.has_previous_state[0] and not layer.record_past
    return type(layer) in (GrowingLayer, GrowingWindow)


def _initialise(layer: FullLayer | RingLayer | RecurrentLayer, mixing: Heads | Latent | Mixer, x: Tensor) -> None:
    """As the layer's first update would, from what it would be given; x: of the cache's type and device."""
    if isinstance(mixing, Heads):
        if not layer.is_initialized:
            layer.lazy_initialization(*[x.new_empty(1, mixing.cached, 0, mixing.size)] * 2)
    elif isinstance(mixing, Latent):
        if not layer.is_initialized:
            layer.lazy_initialization(*[x.new_empty(1, 1, 0, size) for size in (mixing.rank, mixing.turning)])
    elif not layer.is_recurrent_states_initialized[0]:
        channels, width = mixing.convolution.shape
        layer.lazy_initialization(x.new_empty(1, channels, width), width=width)
        shape = 1, mixing.value_heads, mixing.key_size, mixing.value_size
        layer.lazy_initialization(recurrent_states=x.new_empty(shape, dtype=torch.float32))
