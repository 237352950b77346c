"""A synthetic model's decode step on a graphics card: captured, compared with the step run anew, timed by kernel."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
from engine.experts.device import DeviceRuntime
from engine.machine.pinned_memory import Driver
from engine.model import load
from engine.model.static_cache import StepCache


@dataclass(frozen=True)
class Case:
    """What is measured: a model of the catalogue and its first layers, at a level, with near memory, for some tokens.

    None: all layers; near memory as planned. gpu: the one that the token is projected onto.
    """

    name: str
    layers: int | None = None
    level: str = "fast"
    near_bytes: int | None = None
    n_tokens: int = 300
    gpu: Machine | None = None

    def __post_init__(self) -> None:
        if self.n_tokens < 2:
            raise UserError(f"Two tokens are the least that can be timed, not {self.n_tokens}.")

    @property
    def context(self) -> int:
        return self.n_tokens + 8


def steps(case: Case, shape: Shape, driver: Driver, speeds: Speeds,
          report: Callable[[str, float], None] = lambda text, share: None, device: str = "cuda",
          capture: Capture | None = None, held_bytes: int = 0) -> Iterator[Row]:
    """Rows: replay against eager, a token's milliseconds and bytes, kernels, what is left beside the bytes, another
    card, and whole experts in the same near bytes. held_bytes: what others than the model hold of the card."""
    calibration = synthetic.calibration_of(shape)
    options = Options(case.level, case.near_bytes, device=device)
    loaded = synthetic_model.open_on_gpu(shape, calibration, options, driver, report, device)
    try:
        with torch.inference_mode():
            cache = StepCache(loaded.model.config, case.context, device)
            loaded.runtime.hook = synthetic_model.FollowPicks(
                loaded.runtime, calibration["synthetic"]["repeat"], cache.clock.pos)
            decoder = DeviceDecoder(loaded.model, loaded.runtime, cache, adapts=False)
            yield from _rows(decoder, capture, loaded, case, speeds, held_bytes)
    finally:
        loaded.runtime.close()


def _rows(decoder: DeviceDecoder, capture: Capture | None, loaded: load.Loaded, case: Case, speeds: Speeds,
          held_bytes: int) -> Iterator[Row]:
    runtime = loaded.runtime
    known = {"model": f"synthetic {case.name}", "level": case.level, "layers": loaded.spec.layers,
             "near_bytes": runtime.near_bytes}
    decoder.graphs = None
    eager, _ = _answer(decoder, runtime, case)
    decoder.graphs = Graphs(decoder.step, capture)
    replayed, timed = _answer(decoder, runtime, case)
    yield {"measured": "capture", **known, "equal": eager == replayed, "sentence": decoder.reason}
    on_gpu = torch.device(runtime.device).type == "cuda"
    yield timed.row("step", known) | {
        "vram_peak": torch.cuda.max_memory_allocated() - held_bytes if on_gpu else 0}
    yield from step_profile.explained(timed, loaded, lambda n: _tokens(decoder, n),
                                      lambda: _answer(decoder, runtime, case)[1], known, speeds, case.gpu)


def _answer(decoder: DeviceDecoder, runtime: DeviceRuntime, case: Case) -> tuple[list[int], TimedAnswer]:
    """All tokens of an answer from an empty near memory; seconds and bytes of its second half, when it has filled."""
    runtime.reset()
    found, half = [], case.n_tokens // 2
    for drawn in _tokens(decoder, case.n_tokens):
        found.append(drawn.token)
        if len(found) == half:
            before, start = runtime.counters(), time.perf_counter()
    seconds = time.perf_counter() - start
    return found, TimedAnswer(case.n_tokens - half, seconds, runtime.counters() - before, case.context)


def _tokens(decoder: DeviceDecoder, n_tokens: int) -> Iterator[Drawn]:
    decoder.prefix.reset()
    return decoder.tokens([1], Sampling(0.7, 20, 0.95, seed=0), None, frozenset(), n_tokens)
