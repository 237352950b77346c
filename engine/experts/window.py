"""Which tokens of a forward are steps, for the experts of its layers; what those of one step keep together.

Tokens side by side share experts and neurons, so one budget for all of them keeps more of what counts than one for each
would at the same bytes. A score counts as a share of its token's total: no token crowds out another.

Legend: T tokens, k routed experts, I neurons of an expert, K neurons chosen.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.select import select

Tensor = torch.Tensor
LEAST = 1e-30  # of a token's total, where nothing has a score


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


def chosen(scores: Tensor, ids: Tensor, budget: tuple[int | Tensor, ...], capacity: int, histogram: Tensor | None,
           ) -> tuple[Tensor, Tensor]:
    """As kernels.select.select of scores float32 [T, k*I] >= 0 of the experts ids [T, k]: for each token those of the
    chosen neurons that its experts have, int32 [T, K] ascending, then -1, and their fidelity. histogram: of one
    token's."""
    if len(scores) == 1:
        return select(scores, *budget, capacity, histogram)
    n_tokens, k = ids.shape
    neurons, n_slots = scores.shape[1] // k, n_tokens * k
    flat, slots = ids.flatten(), torch.arange(n_slots, device=ids.device)
    first = torch.where(flat[:, None] == flat, slots, n_slots).amin(1)      # [T*k]: where its expert comes first
    shares = (scores / scores.sum(1, keepdim=True).clamp_min(LEAST)).view(n_slots, neurons)
    joint = (slots[:, None] == first).float() @ shares
    found, fidelity = select(joint.view(1, -1), *budget, capacity)      # neurons stand where their expert comes first
    own = first.view(n_tokens, k, 1) == torch.where(found >= 0, found // neurons, -1)[0]      # [T, k, K]
    index = own.int().argmax(1) * neurons + (found % neurons)
    index, order = torch.where(own.any(1), index, scores.shape[1]).sort(1)
    there = index < scores.shape[1]
    return (torch.where(there, index, -1).int(),
            torch.where(there, fidelity.expand(n_tokens, -1).gather(1, order), 0).to(torch.int8))
