"""A synthetic model's decode step on a card: captured, replayed against the step run anew, timed, split by kernel."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch

from engine import catalogue, repeating, synthetic, synthetic_model
from engine.decoding import Decoder, Step
from engine.device_runtime import take_over
from engine.device_sampler import DeviceSampler
from engine.graphs import Graphs
from engine.host_memory import CudaDriver, HostMemory
from engine.spec import Options, Sampling, UserError
from engine.step_cache import StepCache
from engine.synthetic import FarSynthetic

Row = dict[str, object]


def steps(name: str, layers: int | None, level: str, near_bytes: int | None, n_tokens: int,
          say: Callable[[str, float], None]) -> Iterator[Row]:
    """Rows: replay against eager, milliseconds a token, bytes, waits of the host, kernels by time."""
    entry = catalogue.find(name)
    if entry is None:
        raise UserError(f"There is no model {name!r} in the catalogue; choose one of {', '.join(catalogue.entries())}.")
    shape = synthetic.shape_of(entry, layers)
    calibration = synthetic.calibration_of(shape)
    memory = HostMemory(synthetic.bytes_of(shape), CudaDriver())
    try:
        if memory.sentence:
            raise UserError(memory.sentence)
        far = FarSynthetic(shape, memory.bytes, report=say)
        step, known = _opened(shape, calibration, far, level, near_bytes, n_tokens), {"model": name, "level": level}
        known["layers"] = shape.spec.layers
        with torch.inference_mode():
            eager, _ = _answer(step, None, n_tokens)
            graphs = Graphs(step)
            replayed, took = _answer(step, graphs.launch, n_tokens)
            yield {"measured": "capture", **known, "equal": eager == replayed, "sentence": graphs.sentence}
            counters = step.runtime.counters()
            yield {"measured": "step", **known, "ms_per_token": took / n_tokens, "hit_rate": counters.hit_rate,
                   "far_bytes_per_token": counters.far_bytes / (2 * n_tokens),
                   "vram_peak": torch.cuda.max_memory_allocated()}
            yield from _by_kernel(step, graphs, known)
    finally:
        torch.cuda.synchronize()
        memory.close()


def _opened(shape, calibration: dict, far, level: str, near_bytes: int | None, n_tokens: int) -> Step:
    loaded = synthetic_model.around(shape, calibration, far, Options("exact", device="cuda"))
    runtime = take_over(loaded.model, far, "cuda")
    runtime.set_level(level, near_bytes)
    repeating.follow(runtime, calibration["synthetic"]["repeat"])
    cache = StepCache(loaded.model.config, n_tokens + 8, "cuda")
    return Step(loaded.model, runtime, cache, DeviceSampler(shape.spec.vocabulary, n_tokens + 8, "cuda"))


def _answer(step: Step, launch, n_tokens: int) -> tuple[list[int], float]:
    """Tokens of an answer from an empty cache, and its milliseconds without the first token."""
    step.cache.reset()
    step.runtime.reset()
    step.sampler.start(Sampling(0.7, 20, 0.95, seed=0), None, [])
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for drawn in Decoder(step, launch).tokens(1, 0, frozenset(), n_tokens):
        if not found:
            start.record()
        found.append(drawn.token)
    end.record()
    end.synchronize()
    return found, start.elapsed_time(end) * n_tokens / max(1, n_tokens - 1)


def _by_kernel(step: Step, graphs: Graphs, known: Row, n_tokens: int = 20) -> Iterator[Row]:
    """Microseconds a token of every kernel, how many ran, and how often the host waited for the device."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
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
