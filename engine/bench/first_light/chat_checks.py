"""Step 4: the embedded model through the engine, as a person uses it: on the card what the processor says."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.bench.first_light.findings import Finding
from engine.bench.rows import Row
from engine.chat.engine import Engine
from engine.core import Options, Sampling
from engine.experts.device import DeviceRuntime
from engine.machine.process_memory import return_freed
from engine.paths import demo_model
from engine.policies.choice import parse

GREEDY = Sampling(temperature=0, max_tokens=40)
QUESTIONS = ("Tell me a story about a small dog.", "And what happened then?")
BESIDE = "What is the sea like?"
POLICIES = ("predict=repeat,evict=lfu,admit=third", "free=layer,predict=none,evict=popularity", "route=near:0.2:1")
HALF = 5_000_000  # of near memory: about half of the embedded model's experts, so that policies have something to do


def chat(device: str = "cuda", folder: Path | None = None) -> Iterator[Row]:
    folder = folder or demo_model()
    expected, *_ = conversation(folder, "cpu")
    left = []
    for turn in ("first", "second"):
        said, on_device, _ = conversation(folder, device)
        yield Finding("the device computes the experts", on_device == (device == "cuda"), case=f"{turn} opening").row()
        for question, ours, theirs in zip(QUESTIONS, said, expected, strict=True):
            same = len(os.path.commonprefix((ours, theirs)))
            parted = "" if ours == theirs else f"{ours[same:same + 40]!r}, not {theirs[same:same + 40]!r}"
            yield Finding("an answer is the processor's", bool(ours) and not parted, float(same),
                          f"of {len(theirs)} characters", case=f"{turn} opening, {question!r}", note=parted).row()
        return_freed()
        left.append(torch.cuda.memory_reserved() if torch.cuda.is_available() else 0)
    yield Finding("closing gives the card's memory back", left[1] <= left[0], left[1] / 1e6, "MB kept",
                  note=f"{left[0] / 1e6:.0f} MB after the first time").row()
    for policies in POLICIES:
        said, _, note = conversation(folder, device, policies)
        yield Finding("policies are recorded with the step", not note, case=policies, note=note).row()
        if parse(policies).is_exact:
            yield Finding("an answer is the processor's", said == expected, case=policies).row()
    if device == "cuda":
        (ours, _, note), (theirs, *_) = (conversation(folder, device, "miss=beside", near) for near in (HALF, 2 * HALF))
        yield Finding("an answer does not depend on the processor's share", bool(ours) and ours == theirs,
                      case="miss=beside", note=note).row()


def conversation(folder: Path, device: str, policies: str = "", near_bytes: int = HALF) -> tuple[list[str], bool, str]:
    """Both questions with a job beside them in between -> the answers, whether the device's kernels gave them, and what
    a card does less than it might."""
    talk, said = [], []
    options = Options("exact", near_bytes=near_bytes if policies else None, device=device, policies=policies)
    with Engine.open(folder, options) as engine:
        for question in QUESTIONS:
            talk.append({"role": "user", "content": question})
            said.append(_text(engine.chat(talk, GREEDY)))
            talk.append({"role": "assistant", "content": said[-1]})
            _text(engine.side_chat([{"role": "user", "content": BESIDE}], GREEDY))
        return said, isinstance(engine._turns.runtime, DeviceRuntime), engine.snapshot()["note"]


def _text(events) -> str:
    """RuntimeError for an answer that failed."""
    text = ""
    for event in events:
        text += event.text if event.kind == "answer" else ""
        if event.kind == "end" and event.reason == "error":
            raise RuntimeError(event.text)
    return text
