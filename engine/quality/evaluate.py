"""What a level costs: perplexity, KL and agreement against a reference, far bytes and hits, on a text.

Teacher-forced, one token a step through the live policy, near memory empty at the start of every document, nothing
fetched ahead. The reference reads a document in one forward; without a source it is the model's own best level. Only
one document's log-probabilities of the reference are in memory at a time. Knows neither files nor printing.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from engine.core import SPARSE_LEVELS, Counters, UserError
from engine.decode.decoder import given, steps
from engine.decode.prefix_cache import DynamicPrefix
from engine.model.load import Loaded
from engine.quality.loss_probe import Sums, check_vocabulary, log_probabilities

Tensor = torch.Tensor
LONGEST = 1024  # tokens of a document that are read together, less for a model with a shorter context
Report = Callable[[int, int], None]  # (documents done, documents)


@dataclass(frozen=True)
class LevelResult:
    """One level on one text. kl: nats per token from the reference; far bytes: demand, per decoded token."""

    level: str
    perplexity: float
    kl: float
    top1_agreement: float
    far_bytes_per_token: float
    hit_rate: float


@dataclass(frozen=True)
class Evaluation:
    """tokens: how many were predicted, the same for the reference and every level."""

    reference_perplexity: float
    tokens: int
    levels: tuple[LevelResult, ...]

    def document(self) -> dict:
        return {"reference_perplexity": self.reference_perplexity, "tokens": self.tokens,
                "levels": [asdict(level) for level in self.levels]}


def longest(loaded: Loaded) -> int:
    return min(LONGEST, getattr(loaded.model.config, "max_position_embeddings", None) or LONGEST)


def near_bytes(loaded: Loaded, level: str, wish: int | str) -> int:
    """Near memory for `all`, `sketches` (no record is kept; of whole experts: none) or a number of bytes.

    Leaves the runtime at `level`.
    """
    runtime, everything = loaded.runtime, loaded.planner.near_bytes(level)
    runtime.set_level(level, everything)
    if wish == "all":
        return everything
    if wish == "sketches":
        return runtime.sketches_bytes() if level in SPARSE_LEVELS else runtime.smallest_bytes()
    return int(wish)


def evaluate(loaded: Loaded, documents: list[list[int]], levels: list[str], near: int | str = "all",
             reference: Loaded | None = None, report: Report = lambda done, total: None) -> Evaluation:
    """Measure `levels` on documents of token ids, each of two tokens or more.

    UserError for a level that the folder does not offer, or a reference with another vocabulary.
    """
    runtime, source = loaded.runtime, reference or loaded
    for level in levels:
        if level not in runtime.levels:
            raise UserError(f"This model cannot run at level {level}: it offers {', '.join(runtime.levels)}.")
    check_vocabulary(loaded.model, source.model)
    before = (runtime.level, runtime.near_wish, runtime.phase, runtime.predict)
    sums, used = {level: Sums() for level in levels}, dict.fromkeys(levels, Counters())
    reference_sums = Sums()
    try:
        sizes = {level: near_bytes(loaded, level, near) for level in levels}
        with torch.inference_mode():
            for done, ids in enumerate(documents):
                report(done, len(documents))
                logp = reference_of(source, ids)
                reference_sums.add(logp, logp, torch.tensor(ids[1:], device=logp.device))
                for level in sums:
                    runtime.set_level(level, sizes[level])
                    used[level] += stepwise(loaded, ids, logp, sums[level])
    finally:
        runtime.phase, runtime.predict = before[2:]
        runtime.set_level(*before[:2])
    report(len(documents), len(documents))
    return Evaluation(reference_sums.figures()["perplexity"], reference_sums.tokens,
                      tuple(_result(level, sums[level], used[level]) for level in sums))


def _result(level: str, sums: Sums, used: Counters) -> LevelResult:
    perplexity, kl = sums.figures().values()
    return LevelResult(level, perplexity, max(0.0, kl), sums.agreed / sums.tokens, used.far_bytes / sums.tokens,
                       used.hit_rate)


def reference_of(loaded: Loaded, ids: list[int]) -> Tensor:
    """float32 [T-1, V]: log-probabilities of the best level, after each token but the last, in one forward."""
    runtime = loaded.runtime
    runtime.set_level(runtime.levels[0], runtime.top_k * runtime.tokens * runtime.whole_bytes)
    runtime.phase = "prefill"
    return log_probabilities(loaded.model, torch.tensor([ids], device=loaded.model.device))


def stepwise(loaded: Loaded, ids: list[int], reference: Tensor, sums: Sums) -> Counters:
    """One document, one token a step, from what the runtime was just set to; what it used."""
    runtime = loaded.runtime
    runtime.phase, runtime.predict = "decode", False
    before = runtime.counters()
    drawn = steps(DynamicPrefix(loaded.model), ids[:1], given(ids[1:]), len(reference))
    for step, row in zip(drawn, reference, strict=True):
        found = step.logits[None].float().log_softmax(-1)
        sums.add(found, row[None].to(found.device), torch.tensor([step.token], device=found.device))
    return runtime.counters() - before
