"""Why is it slow? Where the time of the running answer goes, from what was measured while it was written.

The bytes that crossed the link, the tokens and the seconds are the engine's own; what they cost follows from this
machine's measured speeds and engine.planning.cost_model's sums, the same that the plan rests on. A card that takes far
longer than its own work explains is waiting for the processor. Pure numbers: no torch, no clock.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.core import Machine, ModelSpec
from engine.planning import cost_model, miss_curves
from engine.planning.sizes import expert_bytes, near_trunk_bytes
from engine.units import rate, size
from kernels.layout import Layout, default_group_size

BOUNDS = ("link", "vram", "trunk", "prefill", "cpu")
WAITING = 2.0  # a card that takes this many times what its work explains waits for the host
_NAMES = {"trunk": "trunk", "experts": "vram", "attention": "vram", "launches": "cpu", "link": "link"}
_WORDS = {"misses": "what is not near", "small operations": "many small operations"}


@dataclass(frozen=True)
class Binding:
    """bound: one of BOUNDS. text: a sentence with the numbers. parts: (what, seconds of one token), as computed."""

    bound: str
    text: str
    parts: cost_model.Times = ()


def what_binds(spec: ModelSpec, calibration: Mapping, machine: Machine, snapshot: Mapping) -> Binding | None:
    """What binds, from an engine's snapshot; None before the first token of the first answer.

    spec, calibration: of the open model. machine: this one, with its measured speeds.
    """
    answer, prompt = snapshot["answer"], snapshot["prompt"]
    if not answer["tokens"]:
        return None
    if prompt["seconds"] > answer["seconds"]:
        return _prefill(prompt, answer)
    parts = _parts(spec, calibration, machine, snapshot)
    each = answer["seconds"] / answer["tokens"]
    return _on_cpu(parts, each) if machine.device == "cpu" else _on_card(parts, each, machine, answer)


def _prefill(prompt: Mapping, answer: Mapping) -> Binding:
    total = prompt["seconds"] + answer["seconds"]
    return Binding("prefill", f"Reading the chat took {prompt['seconds']:.1f} of {total:.1f} s "
                              f"({prompt['tokens']:,} tokens, {rate(prompt['tokens'] / prompt['seconds'])} a second).")


def _parts(spec: ModelSpec, calibration: Mapping, machine: Machine, snapshot: Mapping) -> cost_model.Times:
    answer, level = snapshot["answer"], snapshot["level"]
    layout = _layout(spec, level)
    sparse = miss_curves.calibrated(calibration, spec, layout)
    each = expert_bytes(spec, layout, level)
    far = answer["far_bytes"] / answer["tokens"]
    near = cost_model.Residency(far_bytes=far, needed_bytes=answer["needed_bytes"] / answer["tokens"])
    _, trunk = near_trunk_bytes(spec, snapshot["trunk_bits"], machine.device)
    if machine.device == "cpu":
        read = snapshot["trunk_bits"], trunk
        return cost_model.token_on_cpu(spec, machine, layout, sparse, level, near, read, snapshot["context_used"],
                                       cached=1.0)
    return cost_model.token_on_gpu(spec, machine, layout, sparse, level, near, trunk, each, snapshot["context"])


def _layout(spec, level: str) -> Layout:
    hidden = -(-spec.hidden // 64) * 64 if level == "full" else spec.hidden  # `full` needs no real layout
    return Layout(hidden, spec.neurons, default_group_size(hidden))


def _on_cpu(parts: cost_model.Times, each: float) -> Binding:
    known = sum(seconds for _, seconds in parts)
    most = sorted(parts, key=lambda part: -part[1])[:2]
    shares = " and ".join(f"{_WORDS.get(name, name)} ({100 * seconds / known:.0f} %)" for name, seconds in most)
    return Binding("cpu", f"The processor: {1e3 * each:.1f} ms a token, most of it for {shares}.", parts)


def _on_card(parts: cost_model.Times, each: float, machine: Machine, answer: Mapping) -> Binding:
    known = sum(seconds for _, seconds in parts)
    name, seconds = max(parts, key=lambda part: part[1])
    share = f"{1e3 * seconds:.1f} of {1e3 * each:.1f} ms a token"
    if each > WAITING * known or _NAMES[name] == "cpu":
        return Binding("cpu", f"The processor: the card's own work explains {1e3 * known:.1f} of {1e3 * each:.1f} ms a "
                              "token, the rest is waiting for the program.", parts)
    if name == "link":
        hits = 100 * (1 - answer["far_bytes"] / max(1, answer["needed_bytes"]))
        text = (f"The link between memory and card: {share} for {size(answer['far_bytes'] / answer['tokens'])} at "
                f"{machine.link_bytes_per_second / 1e9:.1f} GB/s; {hits:.0f} % was near, more near memory helps.")
    elif name == "trunk":
        text = f"The trunk, which every token reads whole from video memory: {share}."
    else:
        text = f"Video memory: reading {name} takes {share}."
    return Binding(_NAMES[name], text, parts)
