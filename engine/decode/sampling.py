"""Logits to the next token, with transformers' own processors in transformers' own order.

What the user leaves open is taken from the model's generation_config. Temperature 0 is greedy; with a seed the draws
are reproducible. Does not know where logits come from.
"""
from __future__ import annotations

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.core import MachineError, Sampling, UserError
from kernels.trunk.head import MOST_BEST

NOT_NUMBERS = "The model computed values that are not numbers; open it again, and check its files if this comes back."
COLDEST = 1e-4         # below it float32 overflows; there a logit .01 better is already e^100 times as likely: greedy
LEAST_PENALTY = 1e-2   # the same: scores are divided by it
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def merged(sampling: Sampling, recommended: GenerationConfig | None) -> dict:
    """Every setting with a value: the user's, else the model's, else the neutral one (temperature 0 where the model
    recommends no sampling at all)."""
    model = {name: _possible(name, getattr(recommended, name, None)) for name in SETTINGS}
    chosen = {name: getattr(sampling, name) for name in SETTINGS}
    if chosen["temperature"] is None and any(chosen[name] is not None for name in ("top_k", "top_p", "min_p")):
        chosen["temperature"] = 1.0 if model["temperature"] is None else model["temperature"]
    do_sample = getattr(recommended, "do_sample", None)
    if do_sample is False:
        model["temperature"] = 0.0
    elif do_sample and model["temperature"] is None:
        model["temperature"] = 1.0
    neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    found = {name: next(v for v in (chosen[name], model[name], neutral[name]) if v is not None) for name in SETTINGS}
    return found | {"temperature": found["temperature"] if found["temperature"] >= COLDEST else 0.0,
                    "repetition_penalty": max(found["repetition_penalty"], LEAST_PENALTY)}


def _possible(name: str, value: object) -> object:
    """The folder's recommendation, None where no setting can have that value: some files write -1 for none."""
    try:
        Sampling(**{name: value})
    except UserError:
        return None
    return value


class Sampler:
    """Draws token after token from logits [V] on `device`."""

    def __init__(self, sampling: Sampling, recommended: GenerationConfig | None, device: torch.device | str = "cpu"):
        self.settings = merged(sampling, recommended)
        self._greedy, self.n_best = self.settings["temperature"] == 0, n_best(self.settings)
        self._processors = processors(self.settings)
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor, ids: list[int]) -> int:
        """The next token after `ids` (prompt and answer so far). MachineError when the logits are not numbers."""
        scores = logits[None].float()  # [1, V]
        first, tokens = likeliest(scores[0]), None
        if not torch.isfinite(scores[0, first]):  # NaN, +inf, or -inf everywhere; -inf for some is a mask
            raise MachineError(NOT_NUMBERS)
        if self._greedy and not self._processors:
            return first
        if self.n_best and not self._greedy:    # top-k leaves no others, which would be sorted for nothing
            scores, tokens = scores.topk(min(self.n_best, scores.shape[1]))
        if self._processors:
            history = torch.tensor([ids if self._needs_history else []], dtype=torch.long, device=scores.device)
            scores = self._processors(history, scores)
        if self._greedy:
            return int(scores.argmax())
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        return int(drawn if tokens is None else tokens.gather(1, drawn))

    @property
    def _needs_history(self) -> bool:
        return self.settings["repetition_penalty"] != 1.0


def likeliest(logits: torch.Tensor) -> int:
    """Of logits [V] the largest, or the first that is no number. On a processor numpy finds it in a twentieth of
    torch's time for it alone (13 and 279 us of 151,936)."""
    return int(logits.numpy().argmax() if logits.device.type == "cpu" else logits.argmax())


def n_best(settings: dict) -> int:
    """How many of the largest logits decide, up to MOST_BEST; 0: all, which a penalty needs, too. Of `merged`."""
    top_k = 1 if settings["temperature"] == 0 else settings["top_k"]
    return 0 if settings["repetition_penalty"] != 1.0 or top_k > MOST_BEST else top_k


def processors(settings: dict) -> LogitsProcessorList:
    """transformers' chain for `merged` settings; empty where nothing changes a score."""
    chain = LogitsProcessorList()
    if settings["repetition_penalty"] != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if settings["temperature"] == 0:
        return chain
    if settings["temperature"] != 1.0:
        chain.append(TemperatureLogitsWarper(float(settings["temperature"])))
    if settings["top_k"] > 0:
        chain.append(TopKLogitsWarper(settings["top_k"]))
    if settings["top_p"] < 1.0:
        chain.append(TopPLogitsWarper(float(settings["top_p"])))
    if settings["min_p"] > 0:
        chain.append(MinPLogitsWarper(settings["min_p"]))
    return chain


def end_tokens(recommended: GenerationConfig | None, tokenizer) -> frozenset[int]:
    listed = getattr(recommended, "eos_token_id", None)
    listed = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    return frozenset(i for i in (*listed, tokenizer.eos_token_id) if isinstance(i, int))


def most_tokens(recommended: GenerationConfig | None) -> int | None:
    """The longest answer that the model's folder recommends; None where it names no usable number."""
    most = getattr(recommended, "max_new_tokens", None)
    return most if isinstance(most, int) and most > 0 else None
