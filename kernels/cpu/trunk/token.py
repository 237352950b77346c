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
from kernels.cpu.trunk import attend, delta, linear
from kernels.cpu.trunk import head as nested
from kernels.cpu.trunk.gated import gating
from kernels.cpu.trunk.route import routing
from kernels.trunk.attend import Heads
from kernels.trunk.latent import Latent
from kernels.trunk.linear import Matrices
from kernels.trunk.token import Block, Mapped, Norm

Tensor = torch.Tensor


def token_step(blocks: list[Block], experts: list[Mapped], norm: Norm, head: Matrices, turned: int) -> Token:
    """As kernels.trunk.token.token_step."""
    if any(not isinstance(block, Block) or isinstance(block.mixing, Latent)
           or isinstance(block.mixing, Heads) and block.mixing.window for block in blocks):
        return NotImplemented
    used = [*(part for block in blocks for part in (block.projections, block.output, block.router))]
    used += [block.shared for block in blocks if block.shared is not None]
    is_taken = (linear.takes(head) or nested.takes(head)) and all(map(linear.takes, used))
    if not is_taken or any(own.gate.kind not in KINDS for own in experts):
        return NotImplemented
    return Token(blocks, experts, norm, head, turned)


class Token:
    """As kernels.trunk.token.Token."""

    def __init__(self, blocks: list[Block], experts: list[Mapped], norm: Norm, head: Matrices, turned: int) -> None:
        n, top_k = len(blocks), blocks[0].choice.top_k
        self._blocks, self._rooms = blocks, [(None, None)] * n
        self.x, self.turn = _room(head.columns), torch.empty(2, 1, turned, dtype=torch.float32)
        self.ids, self._shares = (torch.empty(n, top_k, dtype=kind) for kind in (torch.int32, torch.float32))
        self._behind, self._beside = _room(head.columns), _room(head.columns)   # what mixes; a shared expert
        self._normed = torch.zeros(1, experts[0].layout.padded, dtype=torch.float32)
        self._projected = _room(max(block.projections.rows for block in blocks))
        self._mixed = _room(max(block.output.columns for block in blocks))
        self._routed = _room(max(block.router.rows for block in blocks))
        self._out, self._given = _room(head.rows), _room(head.columns)
        self._records, self._layer_of, self._best, steps = [], {}, None, []
        for layer, (block, own) in enumerate(zip(blocks, experts, strict=True)):
            steps += self._mixing(block) + self._choice(block)
            self._layer_of[len(steps)] = layer
            steps += self._experts(block, own, self.ids[layer:layer + 1], self._shares[layer:layer + 1])
        steps += self._head(head, norm)
        self._program = Program(steps)

    def _head(self, head: Matrices, norm: Norm) -> list[Step]:
        if not head.is_nested:
            return linear.multiplying(self.x, head, self._out, norm.weight, norm.epsilon, given=self._given)
        own = nested.finding(self.x, head, self._out[0], 0, norm.weight, norm.epsilon, self._given)
        self._best = np.frombuffer(own[-1].record, nested.RECORD)
        return own

    def _mixing(self, block: Block) -> list[Step]:
        before, mixing, mixed = block.before, block.mixing, self._mixed[:, :block.output.columns]
        steps = linear.multiplying(self.x, block.projections, self._projected, before.weight, before.epsilon,
                                   given=self._given)
        if isinstance(mixing, Heads):
            own = attend.attending(self._projected, self.turn, mixing, mixed)
            self._records.append(np.frombuffer(own[mixing.gated].record, attend.RECORD))
        else:
            own = delta.mixing(self._projected, mixing, mixed)
            self._records.append(np.frombuffer(own[0].record, delta.RECORD))
        return steps + own + linear.multiplying(mixed, block.output, self._behind, residual=self.x)

    def _choice(self, block: Block) -> list[Step]:
        """Router and shared expert, of one product."""
        between, routed = block.between, self._routed[:, :block.router.rows]
        steps = linear.multiplying(self._behind, block.router, routed, between.weight, between.epsilon,
                                   given=self._normed)
        if block.shared is None:
            return steps
        middle = _room(block.shared.columns)
        return [*steps, gating(routed[:, block.n_experts:], middle),
                *linear.multiplying(middle, block.shared, self._beside, residual=self._behind)]

    def _experts(self, block: Block, own: Mapped, ids: Tensor, shares: Tensor) -> list[Step]:
        enter, eight, sixteen = entering(self._normed, own.layout.group, own.budget is not None)
        logits, before = self._routed[:, :block.n_experts], self._behind if block.shared is None else self._beside
        steps, chosen = [routing(logits, block.choice, ids, shares, own.there), enter], None
        if own.budget is not None:
            refined, total = own.budget
            scores = _room(ids.numel() * own.layout.neurons)
            select, *found = selecting(scores, refined, total, total)
            steps += [scoring(eight, own.blobs, ids, shares, own.layout, kind_of(own.gate), own.gate, scores), select]
            chosen = apply.Chosen(*found)
        adding, sums = apply.adding(sixteen, own.blobs, ids, own.layout, own.gate, chosen)
        return steps + adding + [apply.weighing(sums, shares, before, self.x)]

    def takes(self, layer: int, first: Tensor, second: Tensor) -> bool:
        known, mixing = self._rooms[layer], self._blocks[layer].mixing
        if all(known) and known[0]() is first and known[1]() is second:
            return True
        if isinstance(mixing, Heads):
            taken, told = attend.takes(mixing, first, second), attend.of_cache(first, second, 0, 1)
        else:
            taken, told = delta.takes(first, second), delta.of_state(first, second)
        if taken:
            for name, value in told.items():
                self._records[layer][name] = value
            self._rooms[layer] = ref(first), ref(second)    # the cache may go before the next token comes
        return taken

    def at(self, position: int, n_best: int = 0) -> None:
        if self._best is not None:
            self._best["n_best"] = n_best
        for record, block in zip(self._records, self._blocks, strict=True):
            heads = block.mixing
            if isinstance(heads, Heads):
                record["position"], record["n_bytes"] = position, 8 * (position + 1) * heads.cached * heads.size

    def run(self, bring: Callable[[int], None]) -> Tensor:
        at = 0
        while (at := self._program.run(at)) < len(self._program):
            bring(self._layer_of[at])
        return torch.from_numpy(self._out[0].numpy().copy())    # torch's own copy would start its threads


def _room(n: int) -> Tensor:
    return torch.empty(1, n, dtype=torch.float32)
