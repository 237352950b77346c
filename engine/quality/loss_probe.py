"""Loss and divergence (KL) on documents, and how much loss a plan costs over `exact`, with little noise.

The difference of two losses on some thousand tokens is mostly chance: +0.3 % on one half of a corpus, +0.6 % on the
other. Their divergence (KL) hardly differs between halves, but is not what a level promises. Per text their ratio is
one number for all budgets, nearly (0.4 on stories, 0.65 on chats, on the pilot model); it is measured over all that
were tried, and the rise of one is its divergence times that. A promise has to hold on other texts of the kind: so it
is times the upper end of the ratio's interval there, by how the ratio differs between documents.

What was measured is noted a line a document, so that a calibration that was stopped or killed goes on from there.
"""
from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from engine.core import UserError
from engine.disk import write_text_atomically, writing
from engine.experts.layer import LevelPlan
from engine.paths import CALIBRATION_LOG

Tensor = torch.Tensor
Documents = list[Tensor]  # int64 [1, n] each: a loss is measured from the start of a document, as in a conversation
Simulating = Callable[[LevelPlan | None], AbstractContextManager]
CONFIDENCE = 1.2816       # standard errors above an estimate, below which the truth lies 9 times of 10
KEPT = 256                # probabilities of a token that are kept one by one; the others count as one


def log_probabilities(model, ids: Tensor) -> Tensor:
    """float32 [B * (n - 1), V] of the tokens 1.. of documents [B, n]."""
    return model(ids).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)


def loss_of(found: Tensor, targets: Tensor) -> float:
    """Nats, summed over T tokens: found [T, V] log-probabilities, targets [T]."""
    return float(F.nll_loss(found, targets, reduction="sum"))


def check_vocabulary(model, reference) -> None:
    """UserError for a reference of other tokens."""
    ours, theirs = (which.config.get_text_config().vocab_size for which in (model, reference))
    if ours != theirs:
        raise UserError(f"The reference has {theirs:,} tokens in its vocabulary and this model {ours:,}; give the "
                        "checkpoint that it was made from.")


@dataclass
class Sums:
    """Over predicted tokens: loss and KL(reference || found) in nats, and how often both name the same best token."""

    loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def add(self, found: Tensor, reference: Tensor, targets: Tensor) -> None:
        """found, reference: log-probabilities [T, V]; targets [T]."""
        self.loss += loss_of(found, targets)
        self.kl += float((reference.exp() * (reference - found)).sum())
        self.agreed += int((found.argmax(-1) == reference.argmax(-1)).sum())
        self.tokens += len(targets)

    def figures(self) -> dict[str, float]:
        return {"perplexity": math.exp(self.loss / self.tokens), "kl": self.kl / self.tokens}


@dataclass(frozen=True)
class Rise:
    """What a plan loses over `exact` on one text, in nats summed over each document, float64 [D]: the loss, and the
    divergence KL(exact || plan). As single numbers both are means per predicted token."""

    losses: Tensor
    divergences: Tensor
    n_tokens: int

    @property
    def loss(self) -> float:
        return float(self.losses.sum()) / self.n_tokens

    @property
    def divergence(self) -> float:
        return float(self.divergences.sum()) / self.n_tokens


class LossProbe:
    """Measures plans on texts against `exact`, which is run once; a plan is measured once too.

    log: what an earlier run has measured; skipped: is told the tokens that were not read for it.
    """

    def __init__(self, model, simulating: Simulating, texts: Sequence[Documents], log: MeasurementLog | None = None,
                 skipped: Callable[[int], None] = lambda n_tokens: None) -> None:
        self.model, self.simulating, self.texts = model, simulating, texts
        self._log, self._skipped = log, skipped
        with simulating(None):
            self._exact = [[_Kept.of(log_probabilities(model, ids), ids[0, 1:]) for ids in documents]
                           for documents in texts]
        self._measured: dict[LevelPlan, list[Rise]] = {}

    def measure(self, plan: LevelPlan) -> list[Rise]:
        """A rise for each text; a plan is run once."""
        if plan not in self._measured:
            with self.simulating(plan):
                self._measured[plan] = [self._rise(plan, text) for text in range(len(self.texts))]
        return self._measured[plan]

    def _rise(self, plan: LevelPlan, text: int) -> Rise:
        documents = self.texts[text]
        found = [self._document(plan, text, number) for number in range(len(documents))]
        losses, divergences = torch.tensor(found, dtype=torch.float64).T
        return Rise(losses, divergences, sum(ids.shape[1] - 1 for ids in documents))

    def _document(self, plan: LevelPlan, text: int, number: int) -> tuple[float, float]:
        ids, exact = self.texts[text][number], self._exact[text][number]
        known = self._log.get(plan, text, number) if self._log else None
        if known is not None:
            self._skipped(ids.numel())
            return known
        logp = log_probabilities(self.model, ids)
        found = exact.loss_over(logp, ids[0, 1:]), exact.divergence_to(logp)
        if self._log:
            self._log.put(plan, text, number, found)
        return found

    def ratios(self, plans: Sequence[LevelPlan]) -> list[float]:
        """Loss per divergence of each text, over these plans, never below a tenth."""
        return [max(0.1, sum(rise.loss for rise in rises) / max(1e-12, sum(rise.divergence for rise in rises)))
                for rises in self._by_text(plans)]

    def worst(self, plan: LevelPlan, plans: Sequence[LevelPlan]) -> float:
        """The most that a plan's loss may rise, in nats, on the text where that is most: its divergence times the upper
        end of the ratio over `plans`, which leave out neurons in all layers as it does."""
        highest = (max(0.1, highest_ratio(rises)) for rises in self._by_text(plans))
        return max(ratio * rise.divergence for ratio, rise in zip(highest, self.measure(plan), strict=True))

    def _by_text(self, plans: Sequence[LevelPlan]) -> Iterator[tuple[Rise, ...]]:
        return zip(*map(self.measure, plans), strict=True)


def highest_ratio(rises: Sequence[Rise]) -> float:
    """The upper end of the one-sided 90 % interval of loss over divergence, all plans on one text together, by its
    documents: a ratio estimate with Student's t to the first order in 1 / degrees of freedom (Abramowitz and Stegun,
    26.7.5)."""
    losses, divergences = sum(rise.losses for rise in rises), sum(rise.divergences for rise in rises)
    whole, free = divergences.sum().clamp_min(1e-12), max(1, len(losses) - 1)
    ratio = losses.sum() / whole
    error = ((losses - ratio * divergences).square().sum() * len(losses) / free).sqrt() / whole
    return float(ratio + CONFIDENCE * (1 + (CONFIDENCE ** 2 + 1) / (4 * free)) * error)


@dataclass(frozen=True)
class _Kept:
    """What `exact` gives one document of T predicted tokens: its KEPT best tokens, the sum of the rest, the target.

    ids [T, K], logp [T, K], rest [T] and target [T]: log-probabilities.
    """

    ids: Tensor
    logp: Tensor
    rest: Tensor
    target: Tensor

    @staticmethod
    def of(logp: Tensor, targets: Tensor) -> _Kept:
        best = logp.topk(min(KEPT, logp.shape[1]), dim=1)
        return _Kept(best.indices, best.values, _rest(best.values), _at(logp, targets))

    def loss_over(self, found: Tensor, targets: Tensor) -> float:
        return float((self.target - _at(found, targets)).sum())

    def divergence_to(self, found: Tensor) -> float:
        other = found.gather(1, self.ids)
        kept = (self.logp.exp() * (self.logp - other)).sum()
        return float(kept + (self.rest.exp() * (self.rest - _rest(other))).sum())


def _rest(logp: Tensor) -> Tensor:
    """Log of the probability that is not in logp [T, K]; at least e^-30."""
    return (1 - logp.double().exp().sum(1)).clamp_min(1e-13).log().float()


def _at(logp: Tensor, targets: Tensor) -> Tensor:
    return logp.gather(1, targets[:, None])[:, 0]


class MeasurementLog:
    """{(plan, text, document): (loss, divergence)} in a folder; plans are told apart by their repr.

    The lines belong to one subject (this model, these documents, this device); those about another are thrown away, and
    so is a last line that was not finished. Numbers come back with all their bits, so the end is that of a calibration
    that never stopped.
    """

    def __init__(self, folder: Path, subject: str) -> None:
        self._path, self._known = folder / CALIBRATION_LOG, {}
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines() if self._path.is_file() else []
        if lines and lines[0] == subject:
            self._known = dict(pair for line in lines[1:] if (pair := _read(line)))
        lines = [subject, *map(_line, self._known, self._known.values())]
        write_text_atomically(self._path, "\n".join(lines) + "\n")

    def get(self, plan: object, text: int, document: int) -> tuple[float, float] | None:
        return self._known.get(_key(plan, text, document))

    def put(self, plan: object, text: int, document: int, measured: tuple[float, float]) -> None:
        key = _key(plan, text, document)
        self._known[key] = measured
        with writing(self._path, keep=True), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(key, measured) + "\n")


def _key(plan: object, text: int, document: int) -> str:
    return f"{hashlib.sha256(repr(plan).encode()).hexdigest()[:24]} {text} {document}"


def _line(key: str, measured: tuple[float, float]) -> str:
    return json.dumps([key, *measured])


def _read(line: str) -> tuple[str, tuple[float, float]] | None:
    try:
        key, loss, divergence = json.loads(line)
        return str(key), (float(loss), float(divergence))
    except (ValueError, TypeError, RecursionError):
        return None
