"""Steps 3, 7, 8 and 9: synthetic models of real shape, recorded and replayed; and a step that is broken off.

What a step leaves half done (a histogram that was counted and not read, slots that were given and not filled) must not
reach the next answer: after the reset that every failed answer gets (engine/chat/turn.py) it equals a fresh one.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import torch

from engine.bench import gpu_kernels
from engine.bench.first_light.findings import Finding
from engine.bench.gpu_kernels import Speeds
from engine.bench.rows import Row
from engine.bench.step import Case, StepRun, opened
from engine.bench.step_profile import gpu_named
from engine.bench.synthetic import shape_named
from engine.decode.cuda_graph import WARM_UPS, Capture
from engine.experts import runtime as experts
from engine.machine.pinned_memory import CudaDriver, Driver
from engine.units import parse_bytes, size

BREAKS = {"score and select": "chosen", "copy and product": "apply"}    # what a step would have called next
PEAK = 1.05     # of what was planned
ROUNDING = 5e-2     # of the largest logit: 16 bits a layer there, 32 here


class BrokenOff(RuntimeError):
    """A step that does not come to its end."""


def recorded() -> Iterator[Row]:
    """Far less near memory than the experts take: everything is evicted again."""
    yield from measured(Case("qwen3.6-35b-a3b", 4, "fast", parse_bytes("500MB"), 60), *_card(None), then=broken_off)


def fused() -> Iterator[Row]:
    """An architecture whose step is in few launches (engine/model/fused.py)."""
    yield from measured(Case("qwen3-30b-a3b", 4, "exact", parse_bytes("500MB"), 200, n_prompt=9), *_card(None),
                        then=against_transformers)


def whole() -> Iterator[Row]:
    case = Case("qwen3.6-35b-a3b", None, "fast", None, 150, gpu_named("rtx-3060-12gb"), n_prompt=2048)
    yield from measured(case, *_card(parse_bytes("11GiB")))


def gpt_oss() -> Iterator[Row]:
    """The prompt is longer than its window, in the fused step, too."""
    yield from measured(Case("gpt-oss-20b", 4, "exact", parse_bytes("800MB"), 160, n_prompt=256), *_card(None),
                        then=against_transformers)


def gemma() -> Iterator[Row]:
    yield from measured(Case("gemma-4-26b-a4b", 6, "fast", parse_bytes("800MB"), 60, n_prompt=1000), *_card(None))


def _card(vram_bytes: int | None) -> tuple[Driver, Speeds, torch.Tensor | None]:
    """Its driver, its speeds, and what makes it a smaller one for as long as it lives."""
    speeds = gpu_kernels.speeds()
    return CudaDriver(), speeds, gpu_kernels.reserve_vram(vram_bytes)


def measured(case: Case, driver: Driver, speeds: Speeds, held: torch.Tensor | None = None, device: str = "cuda",
             capture: Capture | None = None, then: Callable[[StepRun], Iterator[Finding]] = lambda run: iter(()),
             ) -> Iterator[Row]:
    """Every row of `gpu step`, behind each what it says of works and slow; then what else is found of the run."""
    shape, held_bytes = shape_named(case.name, case.layers), 0 if held is None else held.numel()
    with opened(case, shape, driver, _log, device, capture) as run:
        for row in run.rows(speeds, held_bytes):
            yield row
            yield from (finding.row() for finding in _found(row, case))
        yield from (finding.row() for finding in then(run))


def _log(text: str, share: float) -> None:
    print(f"{share:.0%} {text}", flush=True)


def _found(row: Row, case: Case) -> Iterator[Finding]:
    kind, of = row["measured"], f"{case.name}, {row.get('layers')} layers"
    if kind == "capture":
        yield Finding("the recorded step says what the step itself says", bool(row["equal"] and not row["sentence"]),
                      float(case.n_tokens), "tokens", case=of, note=str(row["sentence"]))
    elif kind == "step":
        yield Finding("decode", True, row["tokens_per_second"], "tokens/s", case=of,
                      note=f"{row['hit_rate']:.0%} hits, {row['far_bytes_per_token'] / 1e6:.2f} MB a token from far")
    elif kind == "prefill":
        yield Finding(f"prefill of {row['tokens']} tokens", True, row["tokens_per_second"], "tokens/s", case=of)
    elif kind == "peak":
        planned = row["vram_planned"]
        yield Finding("memory of the card at its peak", row["vram_peak"] <= PEAK * planned, row["vram_peak"] / planned,
                      "of the plan", case=of, note=f"{size(row['vram_peak'])} of {size(planned)}; {row['memory']}")
    elif kind == "nodes":
        yield Finding("the host waits for nothing between two tokens", not row["waits_per_token"],
                      row["waits_per_token"], "waits a token", case=of)
        yield Finding("nodes", True, row["nodes_per_token"], "a token", case=of,
                      note=f"a layer: {row['own_us_per_layer']:.1f} us in our kernels, "
                           f"{row['other_us_per_layer']:.1f} in others")
    elif kind == "projection":
        yield Finding(f"projected on the {row['card']}", True, row["tokens_per_second"], "tokens/s", case=of)


def against_transformers(run: StepRun) -> Iterator[Finding]:
    """The fused step's logits, token by token behind a prompt, and those of transformers' own forward."""
    prefix = run.decoder.prefix
    fused = prefix.fused
    found = _logits(run)
    prefix.fused = None
    expected = _logits(run)
    prefix.fused = fused
    worst = float((found - expected).abs().max() / expected.abs().max())
    yield Finding("the fused step is transformers' own forward", fused is not None and worst <= ROUNDING, worst,
                  "of the largest logit")


def _logits(run: StepRun) -> torch.Tensor:
    """[prompt, V]: the prompt read token by token, from an empty cache."""
    run.decoder.prefix.reset()
    run.runtime.reset()
    run.runtime.phase = "decode"
    return torch.stack([run.decoder.prefix.feed([token]).float() for token in run.prompt])


def broken_off(run: StepRun) -> Iterator[Finding]:
    """Broken in a step that runs as it is, and in one that is being recorded, at each of the places."""
    run.decoder.graphs = None
    fresh, _ = run.answer()
    for between, name in BREAKS.items():
        per_step = _calls(run, name)
        run.decoder.graphs, broke = None, False
        try:
            with _breaking(name, 1):
                run.answer()
        except BrokenOff:
            broke = True
        run.decoder.prefix.reset()
        yield _again(run, fresh, broke, f"a step broken off between {between}")
        run.record()
        with _breaking(name, WARM_UPS * per_step + 1):
            during, _ = run.answer()
        yield Finding(f"a recording broken off between {between}: the answer goes on",
                      during == fresh and "cannot be captured" in run.decoder.reason, note=run.decoder.reason)
        run.record()
        yield _again(run, fresh, True, f"a recording broken off between {between}")


def _again(run: StepRun, fresh: list[int], broke: bool, what: str) -> Finding:
    """`answer` resets near memory, as a failed answer does."""
    again, _ = run.answer()
    same = sum(a == b for a, b in zip(again, fresh, strict=True))
    reason = run.decoder.reason
    return Finding(f"{what}: the next answer is a fresh one", broke and again == fresh and not reason,
                   float(same), f"of {len(fresh)} tokens", note=reason if broke else "nothing was broken off")


def _calls(run: StepRun, name: str) -> int:
    """How often one step calls it."""
    calls = count()
    with _instead(name, lambda original: lambda *given, **named: (next(calls), original(*given, **named))[1]):
        run.decoder.step.compute()
    return next(calls)


def _breaking(name: str, n_before: int):
    """Inside, the step breaks where it would call `name`, after so many calls that go well."""
    calls = count()

    def make(original):
        def breaks(*given, **named):
            if next(calls) == n_before:
                raise BrokenOff(f"broken off before {name}")
            return original(*given, **named)
        return breaks
    return _instead(name, make)


@contextmanager
def _instead(name: str, make) -> Iterator[None]:
    original = getattr(experts, name)
    setattr(experts, name, make(original))
    try:
        yield
    finally:
        setattr(experts, name, original)
