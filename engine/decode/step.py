"""One decode step on the device: the model's forward of one token, the sampler, the flag that ends the answer.

All state is changed in place, so a step can be recorded and replayed (engine/decode/cuda_graph.py) or run as it is.
Once `done`, a step changes nothing. What a step has to say comes back in one copy of eight numbers.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.core import MachineError
from engine.decode import attention
from engine.decode.device_sampling import DeviceSampler
from engine.decode.sampling import NOT_NUMBERS
from engine.experts.device import DeviceRuntime
from engine.model.fused import device_step
from engine.model.static_cache import Snapshot, StepCache, forward

Tensor = torch.Tensor
MOST_ENDS = 16  # tokens that may end an answer


@dataclass(frozen=True)
class Drawn:
    """A token of the answer; ended: it is the last.

    counts: the first five fields of Counters, totals so far, from a device. logits [V]: what it was drawn from, on the
    host.
    """

    token: int
    ended: bool
    counts: tuple[int, ...] = ()
    logits: Tensor | None = None


class Step:
    """The tensors of one decode step: `run` is `compute`, which gives the logits [V], and `choose`, which draws."""

    def __init__(self, model: torch.nn.Module, runtime: DeviceRuntime, cache: StepCache,
                 sampler: DeviceSampler) -> None:
        self.model, self.runtime, self.cache, self.sampler = model, runtime, cache, sampler
        self.fused, device = device_step(model, cache), sampler.device
        if self.fused:
            self.fused.n_best = sampler.n_best
        else:
            attention.attends(model)
        runtime.done = self.done = cache.clock.done
        self.logits = torch.zeros(len(sampler.seen), device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.left = torch.zeros(1, dtype=torch.int64, device=device)
        self.ends = torch.full((MOST_ENDS,), -1, dtype=torch.int64, device=device)
        self.packet = torch.zeros(8, dtype=torch.int64, device=device)

    def start(self, token: int, ends: frozenset[int], limit: int) -> None:
        """token: the prompt's last. ends: tokens that end the answer. limit: the most tokens that it may have."""
        assert len(ends) <= MOST_ENDS and limit >= 1, (len(ends), limit)
        self.runtime.phase, self.runtime.counted = "decode", None
        self.token.fill_(token)
        self.left.fill_(limit)
        self.ends.copy_(torch.tensor(sorted(ends) + [-1] * (MOST_ENDS - len(ends))))
        self.done.zero_()

    def run(self) -> None:
        self.compute()
        self.choose()

    def compute(self) -> None:
        self.logits.copy_(self.fused(self.token, self.cache) if self.fused else
                          forward(self.model, self.token[None], self.cache)[0, -1])

    def choose(self) -> None:
        drawn = self.sampler.draw(self.logits)
        self.left.sub_(1)
        self.done.logical_or_((drawn == self.ends).any() | (self.left[0] <= 0))
        self.token.copy_(drawn)
        flags = torch.stack((self.done, self.sampler.broken)).long()
        self.packet.copy_(torch.cat((drawn, flags, self.runtime.counts)))

    def save(self, position: int) -> tuple[list[Tensor], Snapshot]:
        """A copy of what a step changes; near memory is left out, it is right after any step. position: tokens read."""
        return [tensor.clone() for tensor in self._changed()], self.cache.snapshot(position)

    def restore(self, saved: tuple[list[Tensor], Snapshot]) -> None:
        self.cache.restore(saved[1])  # first: it takes the answer for unfinished
        for tensor, kept in zip(self._changed(), saved[0], strict=True):
            tensor.copy_(kept)

    def _changed(self) -> list[Tensor]:
        sampler, runtime = self.sampler, self.runtime
        return [self.logits, self.token, self.left, self.packet, self.done, sampler.seen, sampler.n_drawn,
                sampler.n_best, sampler.broken, runtime.counts, runtime.picks,
                *(runtime.hook.state() if runtime.hook else ())]


class Packets:
    """Brings steps' packets to two places in host memory by turns; an event tells when one has arrived."""

    def __init__(self, packet: Tensor) -> None:
        self._packet, self._on_gpu = packet, packet.is_cuda
        self._host = [torch.zeros(packet.shape, dtype=packet.dtype, pin_memory=self._on_gpu) for _ in range(2)]
        self._arrived = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []

    def send(self, turn: int) -> None:
        self._host[turn % 2].copy_(self._packet, non_blocking=True)
        if self._on_gpu:
            self._arrived[turn % 2].record()

    def read(self, turn: int) -> Drawn:
        """Waits for this packet alone. MachineError when the model computed no numbers."""
        if self._on_gpu:
            self._arrived[turn % 2].synchronize()
        token, ended, broken, *counts = self._host[turn % 2].tolist()
        if broken:
            raise MachineError(NOT_NUMBERS)
        return Drawn(token, bool(ended), tuple(counts))
