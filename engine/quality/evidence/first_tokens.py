"""Rows of the evidence about the first tokens of an answer, by what was brought near before anybody asked for it.

Train and test are different answers, as in replayed.py.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from engine.chat.habits import Habits
from engine.core import Picks
from engine.policies.predict import Predictor
from engine.policies.trace import RoutingTrace
from engine.quality.simulate import by_popularity, sizes_of

START = 16  # tokens of an answer in which a warm-up shows


@dataclass(frozen=True)
class Asked:
    """An answer of a trace and what was asked. embeddings float16 [n, H] of the question's tokens; read int64 [L * E],
    how often those picked each expert; picks int64 [t, L * k], what each token of the answer picked."""

    embeddings: np.ndarray
    read: np.ndarray
    picks: np.ndarray

    @property
    def key(self) -> np.ndarray:
        return self.embeddings.astype(np.float32).mean(0)


def answers_of(trace: RoutingTrace) -> list[Asked]:
    """Those to a question that was read anew."""
    run, found = trace.run, []
    for answer in np.unique(trace.answer):
        rows = trace.rows(np.flatnonzero(trace.answer == answer))
        prompt, steps = np.flatnonzero(~rows.decode), rows.steps
        if len(prompt) and len(steps):
            experts = rows.experts.astype(np.int64) + run.experts * np.arange(run.layers)[:, None]
            read = np.bincount(experts[prompt].ravel(), minlength=run.layers * run.experts)
            found.append(Asked(rows.embedding[prompt], read, experts[steps].reshape(len(steps), -1)))
    return found


def while_typing(train: RoutingTrace, test: RoutingTrace, near_bytes: int, learned: Mapping[str, Predictor],
                 ) -> dict[str, float]:
    """Misses of the answers' first tokens, as a share of their picks, near memory being as the answers before left it;
    and with what was brought near while the question was written: what all answers of `train` took most, what the
    question's own tokens take, what the sequence network expects of it, what the answers of `train` to the most similar
    questions took (engine/chat/habits.py)."""
    run, slots, answers = test.run, sizes_of(test.run).divided(near_bytes).slots, answers_of(test)
    habits, size = Habits(), run.layers * run.experts
    for each in answers_of(train):
        counts = np.bincount(each.picks.ravel(), minlength=size)
        habits.add(each.key, Picks(run.layers, run.experts, len(each.picks), tuple(counts.tolist())))
    popular = by_popularity(train).tolist()
    ways = {"as it was left": lambda asked: [], "what everybody took": lambda asked: popular,
            "what the draft takes": lambda asked: _largest(asked.read),
            "what the network expects": lambda asked: _largest(_network(learned, asked.embeddings)),
            "what similar ones took": lambda asked: [
                layer * run.experts + expert for layer, expert in habits.likely(asked.key, run.layers, run.experts)
                .busiest()]}
    missed = dict.fromkeys(ways, 0)
    for name, wanted in ways.items():
        near: dict[int, None] = {}
        for asked in answers:
            near = _brought(near, wanted(asked), slots)
            missed[name] += _missed(near, slots, asked.picks[:START].tolist())
            _missed(near, slots, asked.picks[START:].tolist())
    picks = sum(asked.picks[:START].size for asked in answers)
    return {name: n / max(1, picks) for name, n in missed.items()}


def _network(learned: Mapping[str, Predictor], embeddings: np.ndarray) -> np.ndarray:
    """float32 [L * E]: how often the sequence network expects each expert of a text's tokens."""
    return learned["sequence"](torch.from_numpy(embeddings).float()[None])[0].softmax(-1).sum(0).flatten().numpy()


def _largest(values: np.ndarray) -> list[int]:
    """Those above nothing, the largest first."""
    return [thing for thing in np.argsort(-values, kind="stable").tolist() if values[thing] > 0]


def _brought(near: dict[int, None], wanted: Iterable[int], slots: int) -> dict[int, None]:
    """The most wanted leave last."""
    wanted = list(wanted)[:slots]
    first = set(wanted)
    rest = [thing for thing in near if thing not in first]
    return dict.fromkeys([*rest, *wanted[::-1]][-slots:] if slots else ())


def warm_up(test: RoutingTrace, near_bytes: int, learned: Mapping[str, Predictor]) -> dict[str, float]:
    """The same from an empty near memory: cold; with what the sequence network expects of the question; with what the
    question was really routed to."""
    slots, answers = sizes_of(test.run).divided(near_bytes).slots, answers_of(test)
    ways = {"cold": lambda asked: [], "expected of the draft": lambda asked: _largest(
        _network(learned, asked.embeddings)), "taken by the prompt": lambda asked: _largest(asked.read)}
    picks = sum(asked.picks[:START].size for asked in answers)
    return {name: sum(_missed(_brought({}, wanted(asked), slots), slots, asked.picks[:START].tolist())
                      for asked in answers) / max(1, picks) for name, wanted in ways.items()}


def restored(test: RoutingTrace, near_bytes: int) -> dict[str, float]:
    """Misses when a conversation goes on, as a share of the picks of its next tokens, another one having answered in
    between: as that one left near memory; with what the first half of this one took most brought near before."""
    run, slots = test.run, sizes_of(test.run).divided(near_bytes).slots
    answers = [test.rows(np.flatnonzero(test.answer == answer)) for answer in np.unique(test.answer)]
    taken = [rows.experts[rows.steps].astype(np.int64) + run.experts * np.arange(run.layers)[:, None]
             for rows in answers]
    taken = [each.reshape(len(each), -1) for each in taken if len(each) > START]
    missed, picks = dict.fromkeys(("as it was left", "restored"), 0), 0
    for own, other in zip(taken, taken[1:] + taken[:1], strict=True):
        half = len(own) // 2
        near: dict[int, None] = {}
        for part in (own[:half], other):
            _missed(near, slots, part.tolist())
        often = np.bincount(own[:half].ravel(), minlength=run.layers * run.experts)
        brought = _brought(near, _largest(often), slots)
        following = own[half:half + START]
        missed["as it was left"] += _missed(near, slots, following.tolist())
        missed["restored"] += _missed(brought, slots, following.tolist())
        picks += following.size
    return {name: n / max(1, picks) for name, n in missed.items()}


def _missed(near: dict[int, None], slots: int, tokens: list[list[int]]) -> int:
    n = 0
    for thing in (thing for token in tokens for thing in token):
        if thing in near:
            del near[thing]
        else:
            n += 1
            if not slots:
                continue
            if len(near) >= slots:
                del near[next(iter(near))]
        near[thing] = None
    return n
