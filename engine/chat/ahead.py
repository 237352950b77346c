"""Before a question is asked: what it is likely to need, and afterwards what its answer did need, as habits tell and
learn (engine/chat/habits.py). On the thread that owns the model."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine.chat.habits import Habits
from engine.chat.turn import Turns
from engine.core import Picks, Stopped, UserError

MOST_CHARACTERS = 4000  # of a question, its last ones, that say where it points


def expected(turns: Turns, draft: str, habits: Habits, waits: Callable[[], bool]) -> Picks | None:
    """What the answer to a draft is likely to pick; None where nothing could come near, where nobody knows, and where
    somebody waits meanwhile. Nothing of the draft stays."""
    far = turns.runtime.far
    key = _direction(turns, draft, waits) if _can_bring(turns) and not waits() else None
    return None if key is None else habits.likely(key, far.layers, far.experts)


def learn(turns: Turns, asked: str, picks: Picks, habits: Habits) -> None:
    """What an answer picked, where it may be of use."""
    if _can_bring(turns) and (key := _direction(turns, asked, lambda: False)) is not None:
        habits.add(key, picks)


def _can_bring(turns: Turns) -> bool:
    """Whether not everything is near anyway."""
    return any(len(pool.object_of) < len(pool.slot_of) for pool, _ in turns.runtime.near.pools()[:1])


def _direction(turns: Turns, asked: str, stopped: Callable[[], bool]) -> np.ndarray | None:
    """Where a question points, the mean of its tokens' embeddings: float32 [H]. None where the template refuses it."""
    try:
        ids = turns.tokens.prompt([{"role": "user", "content": asked[-MOST_CHARACTERS:]}], True, None, stopped).ids
    except (Stopped, UserError):
        return None
    found = turns.model.get_input_embeddings()(torch.tensor([ids], device=turns.model.device))
    return found[0].float().mean(0).cpu().numpy()
