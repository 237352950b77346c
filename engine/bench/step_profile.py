"""What one token costs on a graphics card: kernels by time, bytes, whole experts in the same near memory, another card.

Shared by `bench`, for a folder as it is used, and by `gpu step`, for a synthetic model. What reads a clock or a
profile is apart from what is made of it. On another card the token's bytes go over its bandwidths; what the measured
time has left beside its own bytes (launches, arithmetic, waiting) is taken over as it is. Nothing is taken to overlap,
not even look-ahead's branch.
"""
from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from engine.bench.gpu_kernels import Speeds
from engine.bench.rows import Row
from engine.core import SPARSE_LEVELS, Counters, Machine, ModelSpec, UserError
from engine.experts.device import DeviceRuntime
from engine.machine import table
from engine.model.load import Loaded
from engine.model.packed import stored_bytes

# Kernels of kernels/gpu/ as a profile names them; everything else is transformers', the sampler's or a copy.
OURS = frozenset({"_quantize", "_score", "_count", "_count_lower", "_select", "_select_above", "_take", "_fill",
                  "_products", "_down", "_linear", "_add_splits", "_decide", "_free", "_dequantize", "_halve",
                  "_grouped_gate_up", "_grouped_down", "_choose_neurons", "_look_ahead", "_choose", "_attend",
                  "_enter", "_expand", "_delta", "_settle", "_settled_linear", "_scan", "_compute",
                  "_strict_products", "_down_sums"})
# Waits for a stream or the device; a finished token is read by waiting for an event, which is none of these. The
# profiler's own wait at its end counts as well.
WAITS = frozenset({"cudaStreamSynchronize", "cudaDeviceSynchronize"})
MOST_KERNELS = 25
PROFILED = 20  # tokens


@dataclass(frozen=True)
class Needs:
    """What one token takes: bytes of the card's own memory, bytes over the link, seconds."""

    vram_bytes: float
    link_bytes: float
    seconds: float

    def memory_seconds(self, speeds: Speeds) -> float:
        """The least that the bytes alone take, one after the other."""
        return self.vram_bytes / speeds.vram + self.link_bytes / speeds.link

    def outside_seconds(self, speeds: Speeds) -> float:
        """What was measured beside the bytes; none where the bytes, some of them cached, took less than they should."""
        return max(0.0, self.seconds - self.memory_seconds(speeds))


def gpu_named(name: str) -> Machine:
    """The card of assets/machines.toml. UserError for a name that is not there, or is no card that could run this."""
    found = table.described(name)
    if found.device != "cuda":
        raise UserError(f"{found.name} is no card that runs this; choose another name, such as rtx-3060-12gb.")
    return found


def projected(needs: Needs, measured: Speeds, gpu: Machine) -> Row:
    """The token on another card, from its `measured` needs. bound: its bytes alone."""
    speeds = Speeds(gpu.vram_bytes_per_second, gpu.link_bytes_per_second)
    memory, outside = needs.memory_seconds(speeds), needs.outside_seconds(measured)
    return {"measured": "projection", "card": gpu.name, "vram_bytes": int(needs.vram_bytes),
            "link_bytes": int(needs.link_bytes), "vram_ms": 1e3 * needs.vram_bytes / speeds.vram,
            "link_ms": 1e3 * needs.link_bytes / speeds.link, "outside_ms": 1e3 * outside,
            "tokens_per_second": 1 / (memory + outside), "bound_tokens_per_second": 1 / memory}


@dataclass(frozen=True)
class Profile:
    """Per token: microseconds and calls of every kernel or copy by name, longest first, and waits of the host."""

    microseconds: dict[str, float]
    calls: dict[str, float]
    waits: float

    def rows(self, known: Row, layers: int) -> Iterator[Row]:
        yield {"measured": "nodes", **known, "nodes_per_token": sum(self.calls.values()), "waits_per_token": self.waits,
               "own_us_per_layer": self.own() / layers, "other_us_per_layer": self.others() / layers}
        for name in list(self.microseconds)[:MOST_KERNELS]:
            yield {"measured": "kernel", **known, "name": name[:60], "us_per_layer": self.microseconds[name] / layers,
                   "us_per_token": self.microseconds[name], "calls_per_token": self.calls[name]}

    def own(self) -> float:
        return sum(us for name, us in self.microseconds.items() if name in OURS)

    def others(self) -> float:
        return sum(self.microseconds.values()) - self.own()


def summed(events: Iterable, n_tokens: int) -> Profile:
    """Sum torch.profiler's events: what ran on the device, and how often the host waited for it."""
    times, calls, waits = Counter(), Counter(), 0
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.self_device_time_total
            calls[event.name] += 1
        waits += event.name in WAITS
    return Profile({name: us / n_tokens for name, us in times.most_common()},
                   {name: n / n_tokens for name, n in calls.items()}, waits / n_tokens)


@dataclass(frozen=True)
class TimedAnswer:
    """seconds: for all its tokens. context: tokens that its cache has room for."""

    n_tokens: int
    seconds: float
    used: Counters
    context: int

    @property
    def link_bytes(self) -> float:
        """Per token."""
        return self.used.far_bytes / self.n_tokens

    def row(self, measured: str, known: Row) -> Row:
        return {"measured": measured, **known, "ms_per_token": 1e3 * self.seconds / self.n_tokens,
                "tokens_per_second": self.n_tokens / self.seconds, "hit_rate": self.used.hit_rate,
                "needed_bytes_per_token": self.used.needed_bytes / self.n_tokens,
                "far_bytes_per_token": self.link_bytes}


def profiled(tokens: Iterator, n_tokens: int, runtime: DeviceRuntime, context: int) -> tuple[Profile, TimedAnswer]:
    """The n_tokens behind the first one: until it is there, an answer is being prepared, and the host waits."""
    next(tokens)
    before, start = runtime.counters(), time.perf_counter()
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        for _ in tokens:
            pass
    seconds = time.perf_counter() - start
    return summed(profile.events(), n_tokens), TimedAnswer(n_tokens, seconds, runtime.counters() - before, context)


def explained(answer: TimedAnswer, loaded: Loaded, tokens: Callable[[int], Iterator], again: Callable[[], TimedAnswer],
              known: Row, speeds: Speeds, gpu: Machine | None) -> Iterator[Row]:
    """Rows: kernels, what is left of them beside the bytes, the token on another card if one is named, whole experts in
    the same near bytes.

    tokens(n): n tokens with what is near by now. again(): an answer from an empty near memory. A profiler slows down
    what it watches, so its bytes belong to the profile alone.
    """
    runtime, spec, n = loaded.runtime, loaded.spec, min(PROFILED, max(1, answer.n_tokens - 1))
    profile, watched = profiled(tokens(n + 1), n, runtime, answer.context)
    yield from profile.rows(known, spec.layers)
    own = Needs(expert_bytes(runtime, watched.used, n), watched.link_bytes, profile.own() / 1e6)
    of_experts = expert_bytes(runtime, answer.used, answer.n_tokens)
    whole = Needs(vram_bytes(loaded.model, spec, answer.context, of_experts), answer.link_bytes,
                  answer.seconds / answer.n_tokens)
    yield {"measured": "outside memory", **known, "own_us_per_layer": 1e6 * own.outside_seconds(speeds) / spec.layers,
           "us_per_layer": 1e6 * whole.outside_seconds(speeds) / spec.layers,
           "vram_bytes": int(whole.vram_bytes), "link_bytes": int(whole.link_bytes),
           "bound_tokens_per_second": 1 / whole.memory_seconds(speeds)}
    if gpu is not None:
        yield known | projected(whole, speeds, gpu)
    yield from whole_experts(runtime, lambda: again().row("whole experts", known | {"level": "exact"}))


def expert_bytes(runtime: DeviceRuntime, used: Counters, n_tokens: int) -> float:
    """Bytes of near memory that the experts' kernels read for a token: what was needed, and the sketch rows of the
    chosen neurons once more."""
    needed, layout = used.needed_bytes / n_tokens, runtime.far.layout
    if runtime.level == "floe":     # all that is no sketch is whole records
        sketches = runtime.far.layers * runtime.top_k * layout.sketch_bytes
        return needed + (needed - sketches) / layout.record * layout.sketch_row
    if runtime.level in SPARSE_LEVELS:
        return needed + sum(sum(pair) for pair in runtime.plans[runtime.level].budgets) * layout.sketch_row
    return needed


def trunk_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights on the device that every token reads: all but an embedding that is not also the head."""
    weights = {id(p): stored_bytes(p) for p in model.parameters()}
    embedding = getattr(model.get_input_embeddings(), "weight", None)   # none: it lies in host memory
    head = model.get_output_embeddings()
    if embedding is not None and (head is None or head.weight is not embedding):
        weights.pop(id(embedding), None)
    return sum(weights.values())


def vram_bytes(model: torch.nn.Module, spec: ModelSpec, context: int, of_experts: float) -> float:
    """Bytes of the card's memory that a token reads or writes. Attention reads the whole planned context; a state that
    does not grow is read and written."""
    return trunk_bytes(model) + spec.kv_bytes_per_token * context + 2 * spec.state_bytes_at(context) + of_experts


def whole_experts(runtime: DeviceRuntime, measure: Callable[[], Row]) -> Iterator[Row]:
    """The baseline that a sparse level must beat: whole experts, least recently used, in the same near bytes.

    Nothing for a level that keeps whole experts anyway. The level is what it was afterwards.
    """
    level, near_bytes = runtime.level, runtime.near_bytes
    if level not in SPARSE_LEVELS:
        return
    before = runtime.near_wish
    try:
        runtime.set_level("exact", near_bytes)
        yield {"measured": "whole experts", **measure()}
    except UserError as error:      # a few of Mixtral's are larger than everything that a sparse level needs
        yield {"measured": "whole experts", "sentence": str(error)}
    finally:
        runtime.set_level(level, before)
