"""What the model has read so far: its KV cache with the token ids in it, kept from one answer to the next.

The caller brings whole conversations; `reuse` keeps the longest part that is the same and `feed` reads the rest.
Layers with plain attention are cut back to any position. Recurrent states and full sliding windows cannot be, so their
state is copied at marked positions (message boundaries) and reading restarts at the nearest one.
Invariants: the cache holds exactly `ids`; every mark lies on `ids`. A failed forward leaves neither true: call `reset`.
Used by the thread that owns the model, under inference mode.
"""
from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

from engine.model.fused import device_step, host_step
from engine.model.growing_cache import GrowingLayer, GrowingWindow, give_room
from engine.model.static_cache import FullLayer, Snapshot, StepCache, forward
from kernels.trunk.linear import MOST_TOKENS

MAX_MARKS = 8
MAX_MARK_BYTES = 1 << 30              # in host memory; a mark of a 35B hybrid model is about 65 MB
# Model types whose forward, given a state and several tokens at once, loses the state (transformers 5.23).
ONE_BY_ONE = {"jamba", "minimax"}
_CUT_ANYWHERE = {"DynamicLayer", "GrowingLayer", "DynamicIndexedLayer", "DummyLayer"}


@dataclass(frozen=True)
class Mark:
    """The state after the first `position` tokens: {layer index: copy}, or the whole cache for a class of its own."""

    position: int
    state: dict[int, object] | Cache
    n_bytes: int


class Prefix:
    """The live token ids of one model and the cache that belongs to them. A kind of cache brings `wants_marks`
    (some layer can only go back to a mark), one forward, and how it is emptied, cut (False, with nothing changed, where
    a layer cannot be), copied and restored."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._device = model, next(model.parameters()).device
        accepted = inspect.signature(model.forward).parameters
        self._one_by_one = model.config.model_type in ONE_BY_ONE    # a configuration is slow to ask
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._marks: list[Mark | Snapshot] = []
        self.ids: list[int] = []

    @property
    def marks(self) -> list[int]:
        return [mark.position for mark in self._marks]

    @property
    def mark_bytes(self) -> int:
        return sum(mark.n_bytes for mark in self._marks)

    def reset(self) -> None:
        self._empty()
        self._marks, self.ids = [], []

    def reuse(self, ids: list[int]) -> int:
        """Go back to the longest common part with `ids` that can be had; the number of tokens kept.

        At least the last token of `ids` is left to read, because its logits are wanted.
        """
        n_common = common_length(self.ids, ids[:-1])
        if n_common < len(self.ids):
            self._go_back(n_common)
        return len(self.ids)

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Read more tokens; logits [V] after the last one."""
        for part in ([[token] for token in ids] if self._one_by_one and self.ids else [ids]):
            logits = self._forward(part)
            self.ids += part
        return logits

    def _go_back(self, position: int) -> None:
        """To `position`, else to the nearest mark before it, else to the beginning."""
        if not self._cut(position):
            mark = max((m for m in self._marks if m.position <= position), key=lambda m: m.position, default=None)
            if mark is None:
                self.reset()
                return
            self._restore(mark)
            position = mark.position
        self.ids = self.ids[:position]
        self._marks = [mark for mark in self._marks if mark.position <= position]

    def mark(self) -> None:
        """Remember the state here, if this model needs it and it is not remembered yet."""
        if not self.ids or not self.wants_marks or len(self.ids) in self.marks:
            return
        self._marks.append(self._copy())
        self._marks.sort(key=lambda mark: mark.position)
        while len(self._marks) > 1 and (len(self._marks) > MAX_MARKS or self.mark_bytes > MAX_MARK_BYTES):
            # The first one often ends the system message, which a new conversation shares: it goes last.
            del self._marks[1 if len(self._marks) > 2 else 0]


class DynamicPrefix(Prefix):
    """With the cache that transformers makes for the model, which grows; few tokens behind it are a fused step where
    the model has one."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.fused = host_step(model)
        self._cache: Cache | None = None
        self._needs_marks = _has_states(DynamicCache(config=model.config))

    @property
    def wants_marks(self) -> bool:
        return self._needs_marks

    def _forward(self, ids: list[int]) -> torch.Tensor:
        if self.fused and self._cache is not None and self.fused.takes(ids, self._cache):
            return self.fused(ids, self._cache)
        positions = torch.arange(len(self.ids), len(self.ids) + len(ids), device=self._device)[None]
        # Without a cache the model makes the one that it needs; one of its own class may not know its length.
        extra = {} if self._cache is None or self._is_plain() else {"position_ids": positions}
        out = self._model(input_ids=torch.tensor([ids], device=self._device), past_key_values=self._cache,
                          use_cache=True, **self._last_only, **extra)
        self._cache = out.past_key_values
        if self._is_plain():
            give_room(self._cache)
        self._needs_marks = not self._is_plain() or _has_states(self._cache)
        return out.logits[0, -1]

    @property
    def cache_bytes(self) -> int:
        """What the cache takes, the room ahead included."""
        held = [held for layer in getattr(self._cache, "layers", ()) for held in vars(layer).values()]
        tensors = [each for part in held for each in (part if isinstance(part, tuple) else (part,))]
        stores = (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor))
        return sum({store.data_ptr(): store.nbytes() for store in stores}.values())     # a window is seen twice

    def _is_plain(self) -> bool:
        return type(self._cache) is DynamicCache

    def _empty(self) -> None:
        self._cache = None

    def _cut(self, position: int) -> bool:
        if not position:
            self._empty()
            return True
        if not self._is_plain() or not all(map(_can_be_cut, self._cache.layers)):
            return False
        self._crop(self._cache.layers, position)
        return True

    def _copy(self) -> Mark:
        if self._is_plain():
            state = {i: copied(layer, "cpu") for i, layer in enumerate(self._cache.layers)
                     if type(layer).__name__ not in _CUT_ANYWHERE}
        else:
            state = copied(self._cache, "cpu")
        return Mark(len(self.ids), state, tensor_bytes(state))

    def _restore(self, mark: Mark) -> None:
        if not self._is_plain():
            self._cache = copied(mark.state, self._device)
            return
        self._crop([layer for i, layer in enumerate(self._cache.layers) if i not in mark.state], mark.position)
        for i, layer in mark.state.items():
            self._cache.layers[i] = copied(layer, self._device)
        give_room(self._cache)

    def _crop(self, layers: list, position: int) -> None:
        for layer in layers:
            layer.crop(position - len(self.ids))


class StepPrefix(Prefix):
    """With a cache of fixed shape, which a recorded step can run with."""

    def __init__(self, model: torch.nn.Module, cache: StepCache) -> None:
        super().__init__(model)
        self.cache, self.fused = cache, device_step(model, cache)

    @property
    def wants_marks(self) -> bool:
        return not all(isinstance(layer, FullLayer) for layer in self.cache.layers)

    def _forward(self, ids: list[int]) -> torch.Tensor:
        given = torch.tensor([ids], device=self._device)
        if self.fused and len(ids) <= MOST_TOKENS:
            return self.fused(given[0], self.cache)
        return forward(self._model, given, self.cache, **self._last_only)[0, -1]

    def _empty(self) -> None:
        self.cache.reset()

    def _cut(self, position: int) -> bool:
        return self.cache.cut(position, len(self.ids))

    def _copy(self) -> Snapshot:
        return self.cache.snapshot(len(self.ids))

    def _restore(self, mark: Snapshot) -> None:
        self.cache.restore(mark)


def common_length(a: list[int], b: list[int]) -> int:
    """The number of tokens that two sequences share at the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def copied(value, device):
    """A copy of a cache, a layer or a container whose tensors are new and on `device`; the room of a window stays
    behind."""
    if isinstance(value, GrowingWindow):
        return copied(value.plain(), device)
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: copied(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item, device) for item in value)
    if _is_part(value):
        twin = copy.copy(value)
        twin.__dict__ = {key: copied(item, device) for key, item in vars(value).items()}
        return twin
    return value


def tensor_bytes(value) -> int:
    """Bytes of all tensors in what `copied` returns."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, GrowingWindow):
        return tensor_bytes(value.plain())
    if _is_part(value):
        return tensor_bytes(vars(value))
    return 0


def _is_part(value) -> bool:
    """A cache or one of its layers; the configuration that some layers hold is shared, not copied."""
    is_theirs = type(value).__module__.startswith("transformers.") or isinstance(value, GrowingLayer)
    return is_theirs and not hasattr(value, "to_dict")


def _has_states(cache: Cache) -> bool:
    """Whether some layer cannot be cut at any position."""
    return any(type(layer).__name__ not in _CUT_ANYWHERE for layer in cache.layers)


def _can_be_cut(layer) -> bool:
    if type(layer) in (DynamicSlidingWindowLayer, GrowingWindow):  # nothing has left the window yet
        return layer.get_seq_length() < layer.sliding_window
    return type(layer).__name__ in _CUT_ANYWHERE
