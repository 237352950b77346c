"""An open model against llama.cpp on the same weights, threads and tokens, by turns; medians of five.

llama.cpp comes as the package llama-cpp-python, built for this processor in an environment of its own under the data
folder. It reads a GGUF file of the same weights, quantised by its own tool to Q4_K_M. Its process waits while ours
computes, and ours while it does. Ours draws the likeliest token of every step; llama.cpp computes all logits, and
nobody draws.
"""
from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from engine.bench.gguf_writer import write
from engine.bench.throughput import GREEDY, ROUNDS, Run, Sizes
from engine.core import MachineError
from engine.decode.decoder import HostDecoder
from engine.model.load import Loaded
from engine.model.packed import stored_bytes

Report = Callable[[str], None]
CHILD = Path(__file__).with_name("llama_child.py")
KIND = "Q4_K_M"


def environment(data: Path, report: Report) -> Path:
    """The Python of llama.cpp's environment, which is made where it is not there. MachineError where it cannot be."""
    folder = data / "llama.cpp" / "python"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if python.exists() and subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode == 0:
        return python
    report("building llama.cpp in an environment of its own: this takes some ten minutes, once")
    venv.create(folder, with_pip=True)
    made = subprocess.run([python, "-m", "pip", "install", "--quiet", "llama-cpp-python"], capture_output=True,
                          text=True)
    if made.returncode:
        last = (made.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise MachineError(f"llama.cpp cannot be built here ({last}); it needs a C++ compiler and the internet.")
    return python


class Other:
    """llama.cpp in a process of its own, over one file. MachineError where it does not run."""

    def __init__(self, python: Path, source: Path, threads: int, context: int, ordered: bool) -> None:
        """ordered: its weights in the order that the processor likes best."""
        made = source.with_name(f"{source.stem}-{KIND}.gguf")
        given = [str(part) for part in (python, "-I", CHILD, source, made, threads, context, int(ordered))]
        self._process = subprocess.Popen(given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.file_bytes = self._answer()["bytes"]
        self.run([1, 2], [3])

    @classmethod
    def started(cls, *given, report: Report) -> Other:
        """With ordered weights, else as they are stored: on a processor with AMX it crashed on a hidden size of 256."""
        try:
            return cls(*given, True)
        except MachineError as error:
            report(f"{error} It runs with its weights as they are stored, which may be slower for it.")
            return cls(*given, False)

    def run(self, prompt: list[int], tokens: list[int]) -> Run:
        try:
            print(json.dumps({"prompt": prompt, "tokens": tokens}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._answer()
        prefill, decode = self._answer()
        return Run(prefill, prefill, decode)

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise MachineError(f"llama.cpp ended with code {self._process.wait()}.")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@torch.inference_mode()
def compare(loaded: Loaded, data: Path, report: Report = lambda text: None, rounds: int = ROUNDS,
            sizes: Sizes | None = None) -> list[dict]:
    """A row for ours at the best level, at the one that is set, and for llama.cpp."""
    runtime, threads = loaded.runtime, torch.get_num_threads()
    levels = dict.fromkeys((runtime.levels[0], runtime.level))
    sizes = sizes or Sizes.of(loaded.model.config.max_position_embeddings)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(loaded.model.config.vocab_size, (sizes.prefill + sizes.decode,), generator=draw).tolist()
    prompt, tokens = ids[:sizes.prefill], ids[sizes.prefill:]
    python, source = environment(data, report), data / "llama.cpp" / "compared.gguf"
    for old in source.parent.glob("*.gguf"):
        old.unlink()
    n_weights, ours = write(source, loaded.model, runtime.far, report), HostDecoder(loaded.model)
    other = Other.started(python, source, threads, len(ids) + 1, report=report)
    runs: dict[str, list[Run]] = {level: [] for level in (*levels, KIND)}
    try:
        for i in range(rounds + 1):  # the first warms up and does not count
            report(f"against llama.cpp: round {i} of {rounds}" if i else "against llama.cpp: warming up")
            for level, found in runs.items():
                run = other.run(prompt, tokens) if level == KIND else _ours(loaded, ours, level, prompt, tokens)
                found += [run] if i else []
    finally:
        other.close()
        for made in source.parent.glob("*.gguf"):
            made.unlink()
    n_bytes = dict.fromkeys(levels, sum(map(stored_bytes, loaded.model.parameters())) + runtime.everything_bytes())
    n_bytes[KIND] = other.file_bytes
    return [{"implementation": "llama.cpp" if level == KIND else "floe", "level": level, "threads": threads,
             "bits_per_weight": 8 * n_bytes[level] / n_weights,
             "prefill_tokens_per_second": sizes.prefill / median(run.prefill for run in found),
             "decode_tokens_per_second": sizes.decode / median(run.decode for run in found)}
            for level, found in runs.items()]


def _ours(loaded: Loaded, decoder: HostDecoder, level: str, prompt: list[int], tokens: list[int]) -> Run:
    runtime, prefix = loaded.runtime, decoder.prefix
    if runtime.level != level:
        runtime.set_level(level, loaded.planner.near_bytes(level))
    runtime.phase = "auto"
    prefix.reset()
    start = perf_counter()
    prefix.feed(prompt)
    prefilled = perf_counter()
    for _ in decoder.retold(tokens, GREEDY, None):
        pass
    return Run(prefilled - start, prefilled - start, perf_counter() - prefilled)
