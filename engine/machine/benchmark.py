"""How fast this machine really is: half a second of measuring, kept per machine in the data folder's cache.

Only the machine is measured, never a model: a copy (to the card, or within memory), a matrix times a vector, one
small tensor operation, packed experts times a token and times 32, a matrix product. The best of several
repeats counts, and it is kept only if both halves of the half second agree: a busy moment must not become the machine's
speed for good. torch is loaded only when something has to be measured.
"""
from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.core import Machine
from engine.disk import read_json

RATES = ("copy_bytes_per_second", "gemv_bytes_per_second", "operation_seconds", "packed_bytes_per_second",
         "expert_flops_per_second", "flops_per_second")
VERSION = 6        # of what is measured and how; a change makes old caches worthless
AGREE = 1.3        # the slower half over the faster; on a quiet machine they are a few per cent apart
MEASURE_SECONDS = 0.5
MIB = 2**20


def with_rates(machine: Machine, cache_folder: Path, refresh: bool = False) -> Machine:
    """The machine with its measured speeds, from the cache or measured now. Without torch: unchanged."""
    path = cache_folder / f"machine-{_key(machine)}.json"
    rates = None if refresh else _read(path)
    if rates is None:
        try:
            halves = [measure(machine.device, MEASURE_SECONDS / 2) for _ in range(2)]
        except ImportError:
            return machine
        rates, quiet = best_of(*halves)
        if quiet:
            _write(path, rates)
    return apply(machine, rates)


def best_of(one: dict[str, float], other: dict[str, float]) -> tuple[dict[str, float], bool]:
    """The faster of two measurements, rate by rate, and whether they agree; other programs take from one of them."""
    best = {name: (min if name == "operation_seconds" else max)(rate, other[name]) for name, rate in one.items()}
    return best, all(max(rate, other[name]) <= AGREE * min(rate, other[name]) for name, rate in one.items())


def with_cached(machine: Machine, cache_folder: Path) -> Machine:
    """The machine with its speeds if they have been measured before, else unchanged. Loads no torch."""
    rates = _read(cache_folder / f"machine-{_key(machine)}.json")
    return apply(machine, rates) if rates else machine


def apply(machine: Machine, rates: dict[str, float]) -> Machine:
    """Measured speeds into a Machine. On a card the measured copy is the link; its printed matrix speed stays."""
    if machine.device == "cuda":
        return replace(machine, copy_bytes_per_second=rates["copy_bytes_per_second"],
                       link_bytes_per_second=rates["copy_bytes_per_second"])
    return replace(machine, **{name: rates[name] for name in RATES})


def measure(device: str, seconds: float = MEASURE_SECONDS) -> dict[str, float]:
    """The speeds of this machine, in about `seconds`. ImportError without torch."""
    import torch
    if device == "cuda":
        return {"copy_bytes_per_second": _link(torch, seconds)}
    parts = (_copy, _gemv, _operation, _packed, _expert_products, _matrix_product)
    with torch.inference_mode():
        return {name: part(torch, seconds / len(parts)) for name, part in zip(RATES, parts, strict=True)}


def _best(run: Callable[[], object], seconds: float) -> float:
    """Shortest time of one run among as many as fit into `seconds` (three at least; the first warms up)."""
    run()
    best, end, n = float("inf"), time.perf_counter() + seconds, 0
    while n < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best, n = min(best, time.perf_counter() - start), n + 1
    return best


def _copy(torch, seconds: float) -> float:
    source = torch.ones(32 * MIB, dtype=torch.uint8)
    target = torch.empty_like(source)
    return source.numel() / _best(lambda: target.copy_(source), seconds)


def _link(torch, seconds: float) -> float:
    source = torch.ones(64 * MIB, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")

    def run() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
    return source.numel() / _best(run, seconds)


def _gemv(torch, seconds: float) -> float:
    """Matrices of 1 MiB, one here and one there, as layers and experts come: a single large one streams, and one that
    stays in the processor's cache is several times as fast."""
    weights, x = torch.ones(96, 256, 1024), torch.ones(1, 1024)
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(0)).tolist()

    def run() -> None:
        for i in order:
            torch.nn.functional.linear(x, weights[i])
    return weights.numel() * 4 / _best(run, seconds)


def _operation(torch, seconds: float) -> float:
    """One small tensor operation as models make them, Python around it included: a norm, a projection, a rotation,
    a residual on one token of 256 channels are 18 of them. A bare multiplication would be three times too fast."""
    scale, weights, token = torch.ones(256), torch.ones(256, 256), torch.ones(1, 1, 256)

    def run() -> None:
        for _ in range(10):
            x = token.float()
            x = scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(token.dtype)
            x = torch.nn.functional.linear(x, weights).view(1, 1, 4, 64).transpose(1, 2)
            x = torch.cat((-x[..., 32:], x[..., :32]), -1)
            token + x.transpose(1, 2).reshape(1, 1, 256)
    return _best(run, seconds) / 180


def _experts(torch, n: int):
    """(blobs uint8 [n, blob_bytes], their layout): packed experts of 256 neurons over 512."""
    from kernels.layout import Layout
    layout = Layout(512, 256, 128)
    return torch.zeros(n, layout.blob_bytes, dtype=torch.uint8), layout


def _packed(torch, seconds: float) -> float:
    """Experts of 230 kB, eight at a time as a layer of many routes, anywhere in 116 MiB."""
    from kernels.activation import Gate
    from kernels.dense import dense
    blobs, layout = _experts(torch, 512)
    order = torch.randperm(len(blobs), generator=torch.Generator().manual_seed(0)).int().view(-1, 1, 8)
    x, places, gate = torch.ones(1, layout.padded), iter(order.repeat(64, 1, 1)), Gate()
    return 8 * layout.blob_bytes / _best(lambda: dense(x, blobs, next(places), layout, gate), seconds)


def _expert_products(torch, seconds: float) -> float:
    """Operations per second of a packed expert over as many tokens as meet a code at once, as in prefill."""
    from kernels.activation import Gate
    from kernels.dense import grouped
    blobs, layout = _experts(torch, 64)
    x = torch.ones(len(blobs) * 32, layout.padded)

    def run() -> object:
        return grouped(x, list(blobs), [32] * len(blobs), layout, Gate())
    return 2 * len(x) * 3 * 256 * 512 / _best(run, seconds)


def _matrix_product(torch, seconds: float) -> float:
    a, b = torch.ones(128, 1024), torch.ones(1024, 1024)
    return 2 * 128 * 1024 * 1024 / _best(lambda: a @ b, seconds)


def _key(machine: Machine) -> str:
    """Changes when the machine does."""
    from importlib.metadata import PackageNotFoundError, version
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = ""
    said = (VERSION, platform.node(), platform.processor(), os.cpu_count(), os.environ.get("OMP_NUM_THREADS"),
            machine.name, machine.device, machine.ram_total_bytes, machine.vram_total_bytes, torch_version)
    return hashlib.sha256(repr(said).encode()).hexdigest()[:12]


def _read(path: Path) -> dict[str, float] | None:
    try:
        rates = read_json(path)
        named = rates.keys() in (set(RATES), {"copy_bytes_per_second"})
        return rates if named and all(0 < rate < float("inf") for rate in rates.values()) else None
    except (OSError, ValueError, AttributeError, TypeError):  # measured again
        return None


def _write(path: Path, rates: dict[str, float]) -> None:
    """A cache that cannot be written costs half a second next time, nothing else."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(rates))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
