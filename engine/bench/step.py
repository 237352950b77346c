"""A synthetic model's decode step on a graphics card: captured, compared with the step run anew, timed by kernel."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.bench import step_profile, synthetic, synthetic_model
from engine.bench.gpu_kernels import Speeds
from engine.bench.rows import Row
from engine.bench.step_profile import TimedAnswer
from engine.bench.synthetic import Shape
from engine.core import Machine, Options, Sampling, UserError
from engine.decode.cuda_graph import Capture, Graphs
from engine.decode.decoder import DeviceDecoder
from engine.decode.step import Drawn
from engine.machine.pinned_memory import Driver
from engine.model import load
from engine.model.static_cache import StepCache
from engine.planning import explain

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Case:
    """What is measured: a model of the catalogue and its first layers, at a level, with near memory, a prompt of some
    tokens and an answer of some.

    None: all layers; near memory as planned. gpu: the one that the token is projected onto.
    """

    name: str
    layers: int | None = None
    level: str = "fast"
    near_bytes: int | None = None
    n_tokens: int = 300
    gpu: Machine | None = None
    n_prompt: int = 1

    def __post_init__(self) -> None:
        if self.n_tokens < 2:
            raise UserError(f"Two tokens are the least that can be timed, not {self.n_tokens}.")
        assert self.n_prompt >= 1, self

    @property
    def context(self) -> int:
        return self.n_prompt + self.n_tokens + 8

    @property
    def options(self) -> Options:
        return Options(self.level, self.near_bytes)


def steps(case: Case, shape: Shape, driver: Driver, speeds: Speeds, report: Report = lambda text, share: None,
          device: str = "cuda", capture: Capture | None = None, held_bytes: int = 0) -> Iterator[Row]:
    """Rows: replay against eager, prefill, a token's milliseconds and bytes, kernels, what is left beside the bytes,
    another card, and whole experts in the same near bytes. held_bytes: what others than the model hold of the card."""
    with opened(case, shape, driver, report, device, capture) as run:
        yield from run.rows(speeds, held_bytes)


@contextmanager
def opened(case: Case, shape: Shape, driver: Driver, report: Report = lambda text, share: None, device: str = "cuda",
           capture: Capture | None = None) -> Iterator[StepRun]:
    """The model, made up and ready to decode; its memory goes back at the end."""
    calibration = synthetic.calibration_of(shape)
    loaded = synthetic_model.open_on_gpu(shape, calibration, case.options, driver, report, device)
    try:
        with torch.inference_mode():
            cache = StepCache(loaded.model.config, case.context, device)
            loaded.runtime.hook = synthetic_model.FollowPicks(
                loaded.runtime, calibration["synthetic"]["repeat"], cache.clock.pos)
            yield StepRun(DeviceDecoder(loaded.model, loaded.runtime, cache, adapts=False), loaded, case, capture)
    finally:
        loaded.runtime.close()


class StepRun:
    """An open model's step under measurement. decoder.graphs None: kernels are launched one by one."""

    def __init__(self, decoder: DeviceDecoder, loaded: load.Loaded, case: Case, capture: Capture | None) -> None:
        self.decoder, self.loaded, self.runtime, self.case, self._capture = (
            decoder, loaded, loaded.runtime, case, capture)
        self.known = {"model": f"synthetic {case.name}", "level": case.level, "layers": loaded.spec.layers,
                      "near_bytes": self.runtime.near_bytes}
        draw = torch.Generator().manual_seed(2)
        self.prompt = torch.randint(1, loaded.spec.vocabulary, (case.n_prompt,), generator=draw).tolist()

    def rows(self, speeds: Speeds, held_bytes: int = 0) -> Iterator[Row]:
        self.decoder.graphs = None
        eager, _ = self.answer()
        self.record()
        replayed, timed = self.answer()
        yield {"measured": "capture", **self.known, "equal": eager == replayed, "sentence": self.decoder.reason}
        yield timed.row("step", self.known)
        if self.case.n_prompt > 1:
            yield self.prefill()
        if torch.device(self.runtime.device).type == "cuda":
            yield self._peak(torch.cuda.max_memory_allocated() - held_bytes)
        yield from step_profile.explained(timed, self.loaded, self.tokens, lambda: self.answer()[1], self.known, speeds,
                                          self.case.gpu)

    def record(self) -> None:
        """From the next step on it is recorded, anew."""
        self.decoder.graphs = Graphs(self.decoder.step, self._capture)

    def answer(self) -> tuple[list[int], TimedAnswer]:
        """All tokens of an answer from an empty near memory; seconds and bytes of its second half, when it has
        filled."""
        self.runtime.reset()
        found, half, n = [], self.case.n_tokens // 2, self.case.n_tokens
        for drawn in self.tokens(n):
            found.append(drawn.token)
            if len(found) == half:
                before, start = self.runtime.counters(), time.perf_counter()
        seconds = time.perf_counter() - start
        return found, TimedAnswer(n - half, seconds, self.runtime.counters() - before, self.case.context)

    def tokens(self, n_tokens: int) -> Iterator[Drawn]:
        self.decoder.prefix.reset()
        return self.decoder.tokens(self.prompt, Sampling(0.7, 20, 0.95, seed=0), None, frozenset(), n_tokens)

    def prefill(self) -> Row:
        """All of the prompt but its last token, in one forward, the second time."""
        for _ in range(2):
            self.decoder.prefix.reset()
            self.runtime.phase = "prefill"
            start = time.perf_counter()
            float(self.decoder.prefix.feed(self.prompt[:-1])[0])    # waits for the device
            seconds = time.perf_counter() - start
        n = len(self.prompt) - 1
        return {"measured": "prefill", **self.known, "tokens": n, "seconds": seconds, "tokens_per_second": n / seconds}

    def _peak(self, n_bytes: int) -> Row:
        plan = self.loaded.planner.plan(self.case.level, self.case.options)
        return {"measured": "peak", **self.known, "vram_peak": n_bytes, "vram_planned": plan.planned_bytes,
                "memory": explain.memory(plan), "sentence": explain.compare(plan, n_bytes)}
