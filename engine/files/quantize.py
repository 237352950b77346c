"""One matrix to nested codes, without data: a clip search and least squares, group by group.

The 4-bit codes are chosen first (the best of a few clipping ranges, each with its own least-squares scale and offset);
their top two bits are the sketch, fitted again by least squares for itself. Measured on the design's pilot model this
is exactly as good as plain 4-bit, and the sketch costs nothing extra. Runs on any device, in float32.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product

import torch

from kernels.layout import Layout
from kernels.planes import Nested

Tensor = torch.Tensor
CLIPS = (1.0, 0.93, 0.86, 0.79)  # how far the codes reach from the middle of the group's range to either end
NUDGES = ((0.97, 0.0), (1.03, 0.0), (1.0, 0.25), (1.0, -0.25))  # of the step, and of the offset in steps
TINY = 1e-30
BLOCK = 1 << 17  # weights searched at a time on a CPU, so that the some hundred passes stay in its cache


def nested(weight: Tensor, layout: Layout, check: Callable[[], None] = lambda: None) -> Nested:
    """float [R, hidden] -> Nested over [R, padded]. ValueError for values that are not finite. check: is called before
    every block, of which a large expert has thousands, and may raise."""
    rows = max(1, BLOCK // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    blocks = in_parallel(lambda block: check() or _nested_block(block, layout), weight.split(rows))
    return Nested(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def in_parallel(function: Callable, blocks: Iterable[Tensor]) -> list:
    """[function(block), ...], on a CPU as many at a time as torch has threads.

    A thread a block, each on its own: torch's own threads would meet at every one of those passes, which a second
    program on the same cores makes ten times slower than one thread alone.
    """
    blocks, n = list(blocks), torch.get_num_threads()
    if n == 1 or len(blocks) == 1 or blocks[0].device.type != "cpu":
        return [function(block) for block in blocks]
    return list(_pool(n).map(function, blocks))


@cache
def _pool(n: int) -> ThreadPoolExecutor:
    """n threads in which torch starts no further ones. What it would start in other threads stays as it is."""
    started = threading.Barrier(n + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(n, "quantize", initializer=alone)
    for _ in range(n):
        pool.submit(int)  # starts one thread
    started.wait()
    torch.set_num_threads(n)
    return pool


def _nested_block(weight: Tensor, layout: Layout) -> Nested:
    groups = weight.float().unflatten(1, (-1, layout.group))       # [R, G, g]
    if not torch.isfinite(groups).all():
        raise ValueError("the weights contain values that are not finite")
    codes, fine = search(groups)
    coarse = fit((codes >> 2).float(), groups)
    return padded(codes.flatten(1), coarse, fine, layout)


def search(w: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float32 [R, G, g] -> codes uint8 [R, G, g] 0..15 and their (scale, offset) float16 [R, G, 2].

    weights: of the squared errors, [g] or [G, g], each group's sum is 1; None: all count alike.

    Both ends of a group's range are clipped on their own; the best of the 16 ranges, each fitted once, is rounded and
    fitted again twice, then nudged. Squared error on Gaussian groups of 64: 7 % less than with four symmetric ranges.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    middle = (low + high) / 2
    best = None
    for above, below in product(CLIPS, CLIPS):
        start = torch.lerp(middle, low, below)
        step = ((torch.lerp(middle, high, above) - start) / 15).clamp_min(TINY)
        best = _better(w, best, rounded(w, step, start), weights)
    codes = _again(w, _again(w, best[1], weights), weights)
    best = _better(w, best, codes, weights)
    for stretch, shift in NUDGES:
        step = best[2][..., :1].float()
        start = best[2][..., 1:].float() + (7.5 * (1 - stretch) + shift * stretch) * step
        best = _better(w, best, _again(w, rounded(w, step * stretch, start), weights), weights)
    return best[1].to(torch.uint8), best[2]


def _again(w: Tensor, codes: Tensor, weights: Tensor | None) -> Tensor:
    """Codes of the weights on the grid that fits these codes."""
    fitted = fit(codes, w, weights)
    return rounded(w, fitted[..., :1].float(), fitted[..., 1:].float())


def _better(w: Tensor, best: tuple[Tensor, Tensor, Tensor] | None, codes: Tensor, weights: Tensor | None,
            ) -> tuple[Tensor, Tensor, Tensor]:
    """(error [R, G], codes, (scale, offset)): of the best so far and these codes with their fit, group by group."""
    fitted = fit(codes, w, weights)
    error = _error(w, codes, fitted, weights)
    if best is None:
        return error, codes, fitted
    better = (error < best[0])[..., None]                          # [R, G, 1]
    return (torch.minimum(error, best[0]), torch.where(better, codes, best[1]), torch.where(better, fitted, best[2]))


def rounded(w: Tensor, step: Tensor, start: Tensor, top: int = 15) -> Tensor:
    """Codes 0..top, as float32, of the weights on the grid start + step * code."""
    safe = torch.where(step.abs() < TINY, torch.ones_like(step), step)
    return ((w - start) / safe).round_().clamp_(0, top)


def fit(q: Tensor, w: Tensor, weights: Tensor | None = None) -> Tensor:
    """Least-squares (scale, offset) of w over q, rounded to float16: [R, G, 2]. A flat group gets scale 0."""
    def mean(values: Tensor) -> Tensor:
        return values.mean(-1) if weights is None else (values * weights).sum(-1)

    q_mean, w_mean = mean(q), mean(w)
    covariance = mean(q * w) - q_mean * w_mean
    variance = mean(q * q) - q_mean * q_mean
    scale = torch.where(variance > 1e-6, covariance / variance.clamp_min(1e-6), torch.zeros_like(variance))
    scale = scale.clamp(-60000, 60000).to(torch.float16)
    offset = (w_mean - scale.float() * q_mean).clamp(-60000, 60000).to(torch.float16)
    return torch.stack((scale, offset), dim=-1)


def _error(w: Tensor, q: Tensor, fitted: Tensor, weights: Tensor | None) -> Tensor:
    scale, offset = fitted[..., :1].float(), fitted[..., 1:].float()
    squares = (torch.addcmul(offset, q, scale) - w).square_()
    return (squares if weights is None else squares.mul_(weights)).sum(-1)


def padded(codes: Tensor, coarse: Tensor, fine: Tensor, layout: Layout) -> Nested:
    """Codes [R, hidden] and scales [R, G, 2] to the padded width. Groups of the padding get scale and offset 0, so
    their value is 0 whatever the code."""
    more = layout.groups - fine.shape[1]
    coarse, fine = (torch.nn.functional.pad(scales, (0, 0, 0, more)) for scales in (coarse, fine))
    return Nested(torch.nn.functional.pad(codes, (0, layout.padded - codes.shape[1])), coarse, fine)
