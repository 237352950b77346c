"""Compiled twin of kernels/trunk/token.py: the tasks of the separate functions, over buffers that stay.

All layers share one set of buffers. The residual changes sides twice a layer, because a product reads it behind what it
has written.

Legend as there.
"""
from __future__ import annotations

from collections.abc import Callable
from weakref import ref

import numpy as np
import torch

from kernels.activation import KINDS
from kernels.cpu import apply
from kernels.cpu.activation import entering
from kernels.cpu.gate import kind_of
from kernels.cpu.program import Program
from kernels.cpu.score import scoring
from kernels.cpu.select import selecting
from kernels.cpu.threads import Step
from kernels.cpu.trunk import attend, linear
from kernels.cpu.trunk.route import routing
from kernels.trunk.attend import Heads
from kernels.trunk.linear import Matrices
from kernels.trunk.token import Block, Mapped, Norm

Tensor = torch.Tensor


def token_step(blocks: list[Block], experts: list[Mapped], norm: Norm, head: Matrices) -> Token:
    """As kernels.trunk.token.token_step."""
    if not all(isinstance(block, Block) and isinstance(block.mixing, Heads) and not block.mixing.gated
               and not block.mixing.window and block.shared is None for block in blocks):
        return NotImplemented
    used = [head, *(part for block in blocks for part in (block.projections, block.output, block.router))]
    if not all(map(linear.takes, used)) or any(own.gate.kind not in KINDS for own in experts):
        return NotImplemented
    return Token(blocks, experts, norm, head)


class Token:
    """As kernels.trunk.token.Token."""

    def __init__(self, blocks: list[Block], experts: list[Mapped], norm: Norm, head: Matrices) -> None:
        first, n, top_k = blocks[0], len(blocks), blocks[0].choice.top_k
        self._blocks, self._rooms = blocks, [None] * n
        self.x, self.turn = _room(head.columns), torch.empty(2, 1, first.mixing.size)
        self.ids, self._shares = torch.empty(n, top_k, dtype=torch.int32), torch.empty(n, top_k)
        self._behind = _room(head.columns)      # attention
        self._normed = torch.zeros(1, experts[0].layout.padded)
        self._projected, self._attended = _room(first.projections.rows), _room(first.output.columns)
        self._routed, self._out, self._given = _room(first.router.rows), _room(head.rows), _room(head.columns)
        self._row_bytes = 8 * first.mixing.cached * first.mixing.size     # of keys and values
        self._attends, self._layer_of, steps = [], {}, []
        for layer, (block, own) in enumerate(zip(blocks, experts, strict=True)):
            steps += self._attention(block) + self._choice(block)
            self._layer_of[len(steps)] = layer
            steps += self._experts(block, own, self.ids[layer:layer + 1], self._shares[layer:layer + 1])
        steps += linear.multiplying(self.x, head, self._out, norm.weight, norm.epsilon, given=self._given)
        self._program = Program(steps)

    def _attention(self, block: Block) -> list[Step]:
        before = block.before
        steps = linear.multiplying(self.x, block.projections, self._projected, before.weight, before.epsilon,
                                   given=self._given)
        attends = attend.attending(self._projected, self.turn, block.mixing, self._attended)
        self._attends.append(np.frombuffer(attends[0].record, attend.RECORD))
        return steps + attends + linear.multiplying(self._attended, block.output, self._behind, residual=self.x)

    def _choice(self, block: Block) -> list[Step]:
        between = block.between
        return linear.multiplying(self._behind, block.router, self._routed, between.weight, between.epsilon,
                                  given=self._normed)

    def _experts(self, block: Block, own: Mapped, ids: Tensor, shares: Tensor) -> list[Step]:
        enter, eight, sixteen = entering(self._normed, own.layout.group, own.budget is not None)
        steps, chosen = [routing(self._routed, block.choice, ids, shares, own.there), enter], None
        if own.budget is not None:
            refined, total = own.budget
            scores = _room(ids.numel() * own.layout.neurons)
            select, *found = selecting(scores, refined, total, total)
            steps += [scoring(eight, own.blobs, ids, shares, own.layout, kind_of(own.gate), own.gate, scores), select]
            chosen = apply.Chosen(*found)
        adding, sums = apply.adding(sixteen, own.blobs, ids, own.layout, own.gate, chosen)
        return steps + adding + [apply.weighing(sums, shares, self._behind, self.x)]

    def takes(self, layer: int, keys: Tensor, values: Tensor) -> bool:
        known = self._rooms[layer]
        if known is not None and known() is keys:
            return True
        if not attend.takes(self._blocks[layer].mixing, keys, values):
            return False
        for name, value in attend.of_cache(keys, values, 0, 1).items():
            self._attends[layer][name] = value
        self._rooms[layer] = ref(keys)      # the cache may go before the next token comes
        return True

    def at(self, position: int) -> None:
        for record in self._attends:
            record["position"], record["n_bytes"] = position, (position + 1) * self._row_bytes

    def run(self, bring: Callable[[int], None]) -> Tensor:
        at = 0
        while (at := self._program.run(at)) < len(self._program):
            bring(self._layer_of[at])
        return self._out[0].clone()


def _room(n: int) -> Tensor:
    return torch.empty(1, n, dtype=torch.float32)
