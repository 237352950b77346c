"""Which tokens of a forward are steps, for the experts of its layers."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Window:
    """Of each sequence of a forward `length` tokens, the first `whole` of them as a prompt, the others as steps."""

    length: int
    whole: int

    @staticmethod
    def of(phase: str, told: Window | None, n: int) -> Window:
        """For n tokens of all sequences. phase "auto": as told of this forward; where nobody tells, one token is a step
        and more are a prompt."""
        if phase != "auto":
            return Window(n, n if phase == "prefill" else 0)
        return told if told and n % told.length == 0 else Window(n, n if n > 1 else 0)

    def computed(self, prefill: Callable[..., Tensor], decode: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """given: tensors [T, ..], sequence after sequence -> [T, H] in their order."""
        if self.whole in (0, self.length):
            return (prefill if self.whole else decode)(*given)
        rows = [tensor.unflatten(0, (-1, self.length)) for tensor in given]
        begin = prefill(*(part[:, :self.whole].flatten(0, 1) for part in rows))
        end = decode(*(part[:, self.whole:].flatten(0, 1) for part in rows))
        return torch.cat([part.unflatten(0, (len(rows[0]), -1)) for part in (begin, end)], 1).flatten(0, 1)
