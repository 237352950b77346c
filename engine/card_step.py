"""A synthetic model's decode step on a card: captured, replayed against the step run anew, timed, split by kernel."""
from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from engine import catalogue, repeating, synthetic, synthetic_model
from engine.decoding import Decoder, Step
from engine.device_runtime import take_over
from engine.device_sampler import DeviceSampler
from engine.graphs import Capture, Graphs
from engine.host_memory import Driver, HostMemory
from engine.spec import MachineError, Options, Sampling, UserError
from engine.step_cache import StepCache
from engine.synthetic import FarSynthetic, Shape

Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """What is measured: a model of the catalogue and its first layers, at a level, with near memory, for some tokens.

    None: all layers; near memory as planned.
    """

    name: str
    layers: int | None = None
    level: str = "fast"
    near_bytes: int | None = None
    n_tokens: int = 300

    def shape(self) -> Shape:
        """UserError for a model that is not in the catalogue, or has fewer layers."""
        entry = catalogue.find(self.name)
        if entry is None:
            raise UserError(f"There is no model {self.name!r} in the catalogue; choose one of "
                            f"{', '.join(catalogue.entries())}.")
        return synthetic.shape_of(entry, self.layers)


def steps(case: Case, shape: Shape, driver: Driver, say: Callable[[str, float], None] = lambda text, share: None,
          device: str = "cuda", capture: Capture | None = None) -> Iterator[Row]:
    """Rows: replay against eager, milliseconds a token, bytes, waits of the host, kernels by time."""
    memory = HostMemory(synthetic.bytes_of(shape), driver)
    try:
        if memory.sentence:
            raise MachineError(memory.sentence)
        step = _opened(case, shape, FarSynthetic(shape, memory.bytes, report=say), device)
        known = {"model": case.name, "level": case.level, "layers": shape.spec.layers}
        with torch.inference_mode():
            eager, _ = _answer(step, None, case.n_tokens)
            graphs, before = Graphs(step, capture), step.runtime.counters()
            replayed, took = _answer(step, graphs.launch, case.n_tokens)
            used = step.runtime.counters() - before
            yield {"measured": "capture", **known, "equal": eager == replayed, "sentence": graphs.sentence}
            yield {"measured": "step", **known, "ms_per_token": 1e3 * took / case.n_tokens, "hit_rate": used.hit_rate,
                   "far_bytes_per_token": used.far_bytes / case.n_tokens, "near_bytes": step.runtime.near_bytes,
                   "vram_peak": torch.cuda.max_memory_allocated() if device == "cuda" else 0}
            yield from _by_kernel(step, graphs, known)
    finally:
        if device == "cuda":
            torch.cuda.synchronize()
        memory.close()


def _opened(case: Case, shape: Shape, far: FarSynthetic, device: str) -> Step:
    calibration, context = synthetic.calibration_of(shape), case.n_tokens + 8
    loaded = synthetic_model.around(shape, calibration, far, Options("exact", 1 << 30, device=device))
    near_bytes = loaded.room.near_bytes(case.level) if case.near_bytes is None else case.near_bytes
    runtime = take_over(loaded.model, far, device, level=case.level, near_bytes=near_bytes)
    cache = StepCache(loaded.model.config, context, device)
    repeating.follow(runtime, calibration["synthetic"]["repeat"], cache.clock.pos)
    return Step(loaded.model, runtime, cache, DeviceSampler(shape.spec.vocabulary, context, device))


def _answer(step: Step, launch, n_tokens: int) -> tuple[list[int], float]:
    """Tokens of an answer from an empty cache, and its seconds at the speed behind the first half."""
    step.cache.reset()
    step.runtime.reset()
    step.sampler.start(Sampling(0.7, 20, 0.95, seed=0), None, [])
    found, half = [], n_tokens // 2
    for drawn in Decoder(step, launch).tokens(1, 0, frozenset(), n_tokens):
        found.append(drawn.token)
        if len(found) == half:
            start = time.perf_counter()
    return found, (time.perf_counter() - start) * n_tokens / (n_tokens - half)


def _by_kernel(step: Step, graphs: Graphs, known: Row, n_tokens: int = 20) -> Iterator[Row]:
    """Microseconds a token of every kernel, how many ran, and how often the host waited for the device."""
    kinds = torch.profiler.supported_activities()
    with torch.profiler.profile(activities=kinds) as profile:
        _answer(step, graphs.launch, n_tokens)
    times, counts, waits = Counter(), Counter(), 0
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.self_device_time_total
            counts[event.name] += 1
        waits += event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize")
    yield {"measured": "nodes", **known, "nodes_per_token": sum(counts.values()) / n_tokens,
           "waits_per_token": waits / n_tokens}
    for name, microseconds in times.most_common(25):
        yield {"measured": "kernel", **known, "name": name[:60], "us_per_token": microseconds / n_tokens,
               "calls_per_token": counts[name] / n_tokens}
