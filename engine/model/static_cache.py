"""Cache layers for transformers that a recorded decode step can run with: fixed shapes, one position, on the device.

transformers' static sliding-window layer counts in Python, so a captured step repeats the position it was captured at.
Here nothing is counted in Python: every layer reads one position tensor. A full layer writes at the position, a ring at
the position modulo its length, a recurrent layer in place. Each has one row more than it needs: what a finished
sequence (`done`), or one at the end of its context, still writes goes there, where nobody reads. So a step that was
launched ahead of the end of an answer changes nothing.

Legend: N tokens of context, W of a window, T tokens of one step, K width of a convolution. One sequence only.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)

from engine.core import UserError
from kernels.trunk.attend import Heads, attend
from kernels.trunk.delta import Mixer, delta
from kernels.trunk.latent import Latent, attend_latent
from kernels.trunk.linear import MOST_TOKENS

Tensor = torch.Tensor
OWN_CACHE = {"minimax"}  # model types that refuse every cache class but their own (transformers 5.23)
UNSEEN = 1 << 40  # the position of a slot that was never written: later than any query, so every causal mask hides it


class NotCapturable(UserError):
    """This architecture keeps something in its cache that has no layer here; it runs step by step."""


class Clock:
    """What all layers share. `begin` computes where the next T tokens go; `advance` moves on, unless done."""

    def __init__(self, context: int, device: torch.device | str) -> None:
        self.context, self.device = context, device
        self.pos = torch.zeros((), dtype=torch.int64, device=device)
        self.done = torch.zeros((), dtype=torch.bool, device=device)

    def begin(self, n_tokens: int) -> None:
        self.positions = self.pos + torch.arange(n_tokens, device=self.device)
        self.row = self.done.long()[None]  # of a layer's two rows of state
        self._rows: dict[tuple[int, bool], Tensor] = {}

    def rows(self, length: int, wraps: bool) -> Tensor:
        """Rows int64 [T] of a layer with `length` of them; row `length` is the one that nobody reads. Those of a
        forward are computed once, for all layers of one length."""
        if (length, wraps) not in self._rows:
            rows = self.positions % length if wraps else self.positions.clamp(max=length)
            self._rows[length, wraps] = torch.where(self.done, length, rows)
        return self._rows[length, wraps]

    def advance(self, n_tokens: int) -> None:
        self.pos.add_(torch.where(self.done, 0, n_tokens))


class _KeysAndValues(CacheLayerMixin):
    """Keys and values float [1, heads, length + 1, D]; made at the first update. wraps: whether its rows turn round.
    window: how many tokens one sees; 0: all. The keys that an update gives out say whose they are: `lender`."""

    is_compileable = True
    wraps = False

    def __init__(self, clock: Clock, length: int, window: int = 0) -> None:
        super().__init__()
        self.clock, self.length, self.window = clock, length, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (states.new_zeros(1, states.shape[1], self.length + 1, states.shape[3])
                                  for states in (key_states, value_states))
        self.is_initialized = True

    def _write(self, rows: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        self.keys.index_copy_(2, rows, key_states)
        self.values.index_copy_(2, rows, value_states)

    def _read(self) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[:, :, :self.length], self.values[:, :, :self.length]
        keys.lender = self
        return keys, values

    def attend(self, projected: Tensor, turn: Tensor, heads: Heads) -> Tensor:
        """As kernels.trunk.attend, behind the position; in place of `update` and all that reads it."""
        rows = self.clock.rows(self.length, self.wraps)
        return attend(projected, turn, self.keys, self.values, self.clock.pos, heads, rows)

    def attend_held(self, query: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        """As kernels.trunk.attend, behind an update of the same tokens: query [T, Q * D], of the cache's type."""
        cached, size = self.keys.shape[1], self.keys.shape[3]
        heads = Heads(query.shape[1] // size, cached, size, scale, window=self.window, sinks=sinks, held=True)
        return self.attend(query, query.new_empty(2, len(query), 0, dtype=torch.float32), heads)

    def get_seq_length(self) -> Tensor:
        return self.clock.pos

    def get_max_length(self) -> int:
        return self.length


class FullLayer(_KeysAndValues):
    """Row = position. A window nearly as long as the context is one of these, too: its ring would be as long."""

    def __init__(self, clock: Clock, window: int = 0) -> None:
        super().__init__(clock, clock.context, window)
        self.is_sliding = window > 0

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._write(self.clock.rows(self.length, wraps=False), key_states, value_states)
        return self._read()

    def attend_latent(self, query: Tensor, new: Tensor, turn: Tensor, latent: Latent) -> Tensor:
        """As kernels.trunk.latent.attend_latent, likewise; keys are its rows, values its keys."""
        places = self.clock.rows(self.length, wraps=False)
        return attend_latent(query, new, turn, self.keys, self.values, self.clock.pos, latent, places)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def saved(self, position: int) -> tuple[Tensor, ...]:
        return ()

    def restore(self, state: tuple[Tensor, ...]) -> None:
        """Nothing to do: rows from the position on are hidden, and written again before they are seen."""

    def can_go_back(self, position: int) -> bool:
        return True


class RingLayer(_KeysAndValues):
    """The last W tokens and some more, so that a step of few tokens overwrites nothing that its first one sees; row =
    position modulo length. Several tokens at once see the ring as it was, then each other."""

    is_sliding, wraps = True, True

    def __init__(self, clock: Clock, window: int) -> None:
        super().__init__(clock, window + MOST_TOKENS - 1, window)

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = self.clock.rows(self.length, wraps=True)[-self.length:]
        last = key_states[:, :, -self.length:], value_states[:, :, -self.length:]
        if key_states.shape[2] == 1:
            self._write(rows, *last)
            return self._read()
        keys, values = (torch.cat(pair, 2) for pair in zip(self._read(), (key_states, value_states), strict=True))
        self._write(rows, *last)
        keys.lender = self
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, Tensor]:
        """transformers numbers the keys arange(length) + offset; a tensor of offsets gives every row its position."""
        own = torch.arange(self.length, device=self.clock.device)
        newest = self.clock.pos if query_length == 1 else self.clock.pos - 1
        positions = newest - (newest - own) % self.length
        offsets = torch.where(positions < 0, UNSEEN, positions - own)
        if query_length == 1:
            return self.length, offsets
        new = (self.clock.pos - self.length).expand(query_length)
        return self.length + query_length, torch.cat((offsets, new))

    def saved(self, position: int) -> tuple[Tensor, ...]:
        return (self.keys, self.values) if self.is_initialized else ()

    def restore(self, state: tuple[Tensor, ...]) -> None:
        for own, kept in zip((self.keys, self.values), state, strict=False):  # none of an empty cache: all is hidden
            own.copy_(kept)

    def can_go_back(self, position: int) -> bool:
        """Whether nothing has been overwritten yet after `position` tokens."""
        return position <= self.length


class RecurrentLayer(LinearAttentionCacheLayerMixin):
    """Convolution and recurrent state, float [2, ...] each: row 0 is the state, row 1 what a finished sequence writes.

    A model's one-token convolution changes the state it is lent in place, so it is lent a copy, written back by
    `end`. The recurrent state is only read; the new one is handed in.
    """

    def __init__(self, clock: Clock, number_of_states: int = 1) -> None:
        super().__init__(number_of_states)
        self.clock = clock
        self._conv: dict[int, Tensor] = {}
        self._recurrent: dict[int, Tensor] = {}

    def begin(self) -> None:
        for i, state in self._conv.items():
            self.conv_states[i] = state[:1].clone()

    def end(self) -> None:
        for i, state in self._conv.items():
            state.index_copy_(0, self.clock.row, self.conv_states[i])

    def lazy_initialization(self, conv_states: Tensor | None = None, recurrent_states: Tensor | None = None,
                            state_idx: int = 0, width: int = 0) -> None:
        if conv_states is not None:
            self._conv[state_idx] = conv_states.new_zeros(2, *conv_states.shape[1:-1], width)
            self.conv_states[state_idx] = self._conv[state_idx][:1].clone()
            self.is_conv_states_initialized[state_idx] = True
        else:
            self._recurrent[state_idx] = recurrent_states.new_zeros(2, *recurrent_states.shape[1:])
            self.recurrent_states[state_idx] = self._recurrent[state_idx][:1]
            self.is_recurrent_states_initialized[state_idx] = True
        self.has_previous_state[state_idx] = True  # from here on: zeros are what "no state yet" means

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None,
                          **_) -> Tensor:
        """-> [1, C, K + T]: the state before, then the new columns."""
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(conv_states, state_idx=state_idx,
                                     width=conv_kernel_size or conv_states.shape[-1])
        state = self.conv_states[state_idx]
        full = torch.cat((state, conv_states), -1)
        state.copy_(full[..., -state.shape[-1]:])
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_) -> Tensor:
        if not self.is_recurrent_states_initialized[state_idx]:
            self.lazy_initialization(recurrent_states=recurrent_states, state_idx=state_idx)
        self._recurrent[state_idx].index_copy_(0, self.clock.row, recurrent_states)
        return self.recurrent_states[state_idx]

    def mix(self, projected: Tensor, mixer: Mixer) -> Tensor:
        """As kernels.trunk.delta, in place of `begin`, the updates and `end`."""
        return delta(projected, self._conv[0], self._recurrent[0], mixer, self.clock.row)

    def reset(self) -> None:
        for state in (*self._conv.values(), *self._recurrent.values()):
            state.zero_()

    def saved(self, position: int) -> tuple[Tensor, ...]:
        return tuple(state[:1] for state in (*self._conv.values(), *self._recurrent.values()))

    def restore(self, state: tuple[Tensor, ...]) -> None:
        if not state:  # of an empty cache
            self.reset()
        for own, kept in zip((*self._conv.values(), *self._recurrent.values()), state, strict=bool(state)):
            own[:1].copy_(kept)

    def can_go_back(self, position: int) -> bool:
        return False


@dataclass(frozen=True)
class Snapshot:
    """The state after `position` tokens: what cannot be had back from the rows of full layers, in host memory."""

    position: int
    layers: tuple[tuple[Tensor, ...], ...]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in layer)


class StepCache(Cache):
    """The cache of one model for `context` tokens. NotCapturable for kinds of layer that have no fixed form here."""

    def __init__(self, config, context: int, device: torch.device | str = "cpu") -> None:
        if config.model_type in OWN_CACHE:
            raise NotCapturable(f"{config.model_type} takes no cache but its own; it runs step by step.")
        self.clock = Clock(context, device)
        kinds, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        super().__init__(layers=[self._layer(kind, given) for kind, given in zip(kinds, arguments, strict=True)])
        if not any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            raise NotCapturable(f"{config.model_type} has no attention layer; it runs step by step.")

    def _layer(self, kind: str, given: dict):
        if kind == "dummy":
            return DummyLayer()
        if kind == "full_attention":
            return FullLayer(self.clock)
        if kind == "sliding_attention":
            ring = RingLayer(self.clock, given["sliding_window"])
            return ring if ring.length < self.clock.context else FullLayer(self.clock, ring.window)
        if kind == "linear_attention":
            return RecurrentLayer(self.clock, **given)
        raise NotCapturable(f"Layers of kind {kind} have no cache of fixed shape; this model runs step by step.")

    def begin(self, n_tokens: int) -> None:
        """Before a forward of T tokens."""
        self.clock.begin(n_tokens)
        for layer in self._recurrent:
            layer.begin()

    def advance(self, n_tokens: int) -> None:
        """After a forward of T tokens."""
        for layer in self._recurrent:
            layer.end()
        self.clock.advance(n_tokens)

    @property
    def _recurrent(self) -> list[RecurrentLayer]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]

    def reset(self) -> None:
        """An empty cache, the same tensors."""
        super().reset()
        self.clock.pos.zero_()
        self.clock.done.zero_()

    # --- between answers: position is a number of the caller's, so nothing waits for the device ------------------
    def snapshot(self, position: int) -> Snapshot:
        """A copy in host memory of what `restore` needs; position: tokens read so far."""
        layers = (layer.saved(position) if not isinstance(layer, DummyLayer) else () for layer in self.layers)
        return Snapshot(position, tuple(tuple(t.to("cpu", copy=True) for t in saved) for saved in layers))

    def restore(self, snapshot: Snapshot) -> None:
        for layer, state in zip(self.layers, snapshot.layers, strict=True):
            if not isinstance(layer, DummyLayer):
                layer.restore(state)
        self._go_to(snapshot.position)

    def cut(self, position: int, read: int) -> bool:
        """Forget all but `position` of `read` tokens; False, with nothing changed, where a layer cannot."""
        if not all(isinstance(layer, DummyLayer) or layer.can_go_back(read) for layer in self.layers):
            return False
        self._go_to(position)
        return True

    def _go_to(self, position: int) -> None:
        self.clock.pos.fill_(position)
        self.clock.done.zero_()


def forward(model: torch.nn.Module, ids: Tensor, cache: StepCache, **options) -> Tensor:
    """One forward of ids int64 [1, T] behind what `cache` holds -> logits [1, T or logits_to_keep, V]."""
    n_tokens = ids.shape[1]
    cache.begin(n_tokens)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, position_ids=cache.clock.positions[None],
                **options)
    cache.advance(n_tokens)
    return out.logits
