"""Which tokens of a forward are steps. A level is for steps; a prompt is read with every neuron.

The engine says itself what it does (`Runtime.phase`). transformers' own generation does not say, so a forward is looked
at before it runs: up to STEP_TOKENS tokens of each sequence are steps, and so are the guesses of assisted generation
and, without a cache, the tokens that came behind the prompt. Batches, prompt lookup and `use_cache=False` thereby give
greedy's text.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.experts.runtime import Runtime
from engine.experts.window import Window

STEP_TOKENS = 4


@dataclass
class Windows:
    """Tells one model's runtime, forward by forward. prompt [B, n], length: of the last forward without a cache."""

    runtime: Runtime
    prompt: Tensor | None = None
    length: int = 0

    def watch(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, always_call=True)

    def begin(self, model: nn.Module, args: tuple, named: dict) -> None:
        ids = named.get("input_ids", args[0] if args else None)
        given = ids if ids is not None else named.get("inputs_embeds")
        if self.runtime.phase == "auto" and given is not None:
            self.runtime.window = Window(given.shape[1], self._read_whole(given, ids, named))

    def end(self, *_) -> None:
        self.runtime.window = None

    def _read_whole(self, given: Tensor, ids: Tensor | None, named: dict) -> int:
        """How many tokens of each sequence, the first ones, are a prompt."""
        length, kept = given.shape[1], named.get("logits_to_keep", 0)
        if named.get("use_cache") is False and named.get("past_key_values") is None and ids is not None:
            return self._without_cache(ids)
        guesses = kept - 1 if isinstance(kept, int) and 1 < kept <= length else 0
        return length - guesses if length - guesses > STEP_TOKENS else 0

    def _without_cache(self, ids: Tensor) -> int:
        """The whole text comes again and again, longer by a step each time."""
        before, length = self.prompt, ids.shape[1]
        goes_on = (before is not None and len(before) == len(ids) and 0 < length - self.length <= STEP_TOKENS
                   and torch.equal(ids[:, :before.shape[1]], before))
        if not goes_on:
            self.prompt = ids[:, :length if length > STEP_TOKENS else 0].clone()
        self.length = length
        return self.prompt.shape[1]
