"""How fast a model runs here, and what bounds it.

Random tokens as llama-bench does (prefill, then decode one at a time), and the model's own text from a cold and from a
warm near memory. A device decodes as it does in a chat: alone, a step ahead of its reader, through its graph where it
has one; there the random tokens are the model's own draws, nearly all alike likely. A synthetic model's picks are made
up by a hook; where all lies in a processor's map no time depends on them, but a hook costs the one call of a token, so
they are counted in a run of their own. The comparison runs transformers'
own experts implementations on an uncompressed model of the same weights and dtype, with the same threads and kind of
cache, interleaved with ours, and takes medians. Clocks are read only at the ends of a run, after the device has
finished. Prints nothing.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from engine.bench import step_profile, synthetic_model
from engine.bench.gpu_kernels import Speeds
from engine.bench.rows import Row
from engine.bench.step_profile import TimedAnswer
from engine.chat.tokenizer import Tokens
from engine.core import Counters, Machine, Options, Sampling, UserError
from engine.decode.decoder import Decoder, HostDecoder, decoder_for
from engine.decode.step import Drawn
from engine.experts.device import DeviceRuntime
from engine.experts.host import HostRuntime
from engine.files.manifest import EXPERTS
from engine.files.skeleton import experts_modules
from engine.machine import benchmark
from engine.model.load import Loaded
from engine.model.packed import plain
from engine.model.registration import FloeExperts
from engine.planning.sizes import planned_chunk

PREFILL, DECODE = 512, 128  # tokens
ROUNDS = 5
RANDOM = Sampling(10.0, 256, 1.0, 0.0, 1.0, seed=0)  # what a device draws in place of random tokens
GREEDY = Sampling(0.0, 0, 1.0, 0.0, 1.0)
QUESTIONS = ("Tell me a story about a small dog.", "What do you like to do on a rainy day?")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """Tokens of one run: what the context has room for, at most 512 and 128."""

    prefill: int
    decode: int

    @classmethod
    def of(cls, context: int | None) -> Sizes:
        decode = min(DECODE, (context or PREFILL + DECODE) // 4)
        sizes = cls(min(PREFILL, (context or PREFILL + DECODE) - decode), decode)
        if sizes.prefill < 1 or sizes.decode < 2:
            raise UserError(f"A context of {context} tokens is too short to measure in.")
        return sizes


@dataclass(frozen=True)
class Run:
    """Seconds of one run, and what its decode steps counted. first_token: prompt to first logits of decode."""

    prefill: float
    first_token: float
    decode: float
    counters: Counters = Counters()


class Bench:
    """One open model under measurement. chunk: tokens of one prefill forward. copy_bytes_per_second: of the link,
    where it was measured while the card was empty."""

    def __init__(self, loaded: Loaded, chunk: int | None = None, report: Report = lambda text: None,
                 sizes: Sizes | None = None, copy_bytes_per_second: float | None = None) -> None:
        self.loaded, self.report, self._copy = loaded, report, copy_bytes_per_second
        self.device = loaded.model.device
        self.sizes = sizes or Sizes.of(getattr(loaded.model.config, "max_position_embeddings", None))
        self.synthetic = loaded.planner.calibration.get("synthetic")  # made-up weights: the picks are made up as well
        self._picks = synthetic_model.FollowPicks(loaded.runtime, self.synthetic["repeat"]) if self.synthetic else None
        if self._counts_apart:
            report("a synthetic model: times with the picks of its own router, bytes and hits with made-up ones")
        elif self._picks:
            loaded.runtime.hook = self._picks
        draw = torch.Generator().manual_seed(0)
        n_tokens = self.sizes.prefill + self.sizes.decode
        self.ids = torch.randint(loaded.model.config.vocab_size, (n_tokens,), generator=draw).tolist()
        self.context = context_for(loaded, self.sizes)
        self.chunk = chunk or planned_chunk(loaded.spec, self.device.type, self.context)
        self.decoder = decoder_for(loaded.model, loaded.runtime, self.context)

    @torch.inference_mode()
    def document(self) -> dict:
        """Everything but the comparison, at the level that the runtime is set to."""
        runtime, sizes = self.loaded.runtime, self.sizes
        self.report(f"random tokens: {sizes.prefill} of prefill, {sizes.decode} of decode")
        self._warm_up()
        random = self.random
        self.report("the model's own text, cold and warm")
        cold, warm = self._own_text()
        rates = {"copy_bytes_per_second": self._copy} if self._copy else benchmark.measure(self.device.type)
        copy = rates["copy_bytes_per_second"]
        needed = random.counters.needed_bytes / sizes.decode
        return {
            "prefill_tokens_per_second": sizes.prefill / random.prefill,
            "decode_tokens_per_second": sizes.decode / random.decode,
            "time_to_first_token_ms": random.first_token * 1e3,
            **_per_token(random.counters, sizes.decode),
            "bound_tokens_per_second": copy / needed, "planned_tokens_per_second": self._planned(rates),
            "device": self.device.type, "level": runtime.level, "near_bytes": runtime.near_bytes,
            "prefill_tokens": sizes.prefill, "decode_tokens": sizes.decode, "chunk": self.chunk,
            "needed_bytes_per_token": needed, "copy_bytes_per_second": copy,
            "own_text": {"cold": cold, "warm": warm}, "note": self.reason,
            **({"synthetic": True} if self.synthetic else {}),
        }

    @property
    def _counts_apart(self) -> bool:
        runtime = self.loaded.runtime
        return self._picks is not None and isinstance(runtime, HostRuntime) and runtime.is_mapped

    def _planned(self, rates: dict[str, float]) -> float:
        """What the plan expects of this level and near memory where the machine has these speeds."""
        planner = replace(self.loaded.planner, machine=benchmark.apply(self.loaded.planner.machine, rates))
        runtime, context = self.loaded.runtime, self.context
        if isinstance(runtime, HostRuntime):    # whose cache is half full in the plan
            context = 2 * self.sizes.prefill + self.sizes.decode
        context = min(context, self.loaded.spec.context)
        made = planner.plan(runtime.level, Options(near_bytes=runtime.near_bytes, context=context))
        return made.decode_tokens_per_second

    @property
    def reason(self) -> str:
        """Why a device does less than it might (no graph, experts on the processor), else ""."""
        return self.loaded.runtime.reason or self.decoder.reason

    @cached_property
    def random(self) -> Run:
        """Medians of prefill and decode of random tokens, each time from an empty near memory; measured once."""
        if not self._counts_apart:
            return self._median_of([self._random() for _ in range(3)])
        with self.loaded.runtime.hooked(self._picks):
            counted = self._random()
        return replace(self._median_of([self._random() for _ in range(3)]), counters=counted.counters)

    @torch.inference_mode()
    def rows(self, speeds: Speeds, gpu: Machine | None = None) -> Iterator[Row]:
        """What a device's random tokens cost: kernels, what is left beside the bytes, another card, and whole experts
        in the same near bytes."""
        loaded, runtime = self.loaded, self.loaded.runtime
        name = f"synthetic {loaded.spec.name}" if self.synthetic else loaded.spec.name
        known = {"model": name, "level": runtime.level, "layers": loaded.spec.layers, "near_bytes": runtime.near_bytes}
        timed = self._timed(self.random)
        yield timed.row("bench", known) | {"note": self.reason}
        yield from step_profile.explained(timed, loaded, self._few, self._again, known, speeds, gpu)

    def _timed(self, run: Run) -> TimedAnswer:
        return TimedAnswer(self.sizes.decode, run.decode, run.counters, self.context)

    def _few(self, n: int) -> Iterator[Drawn]:
        self._read(self.ids[:1])
        return self._decode(self.ids[-n:])

    def _again(self) -> TimedAnswer:
        self.report("whole experts in the same near memory")
        self._warm_up()
        return self._timed(self._random())

    def _warm_up(self) -> None:
        """For what is made or compiled at first use: a device's graphs, with look-ahead and without."""
        for headroom in (False, True) if self.decoder.on_device else ():
            self.loaded.runtime.headroom = headroom
            self._read(self.ids[:1])
            for _ in self._decode(self.ids[-2:]):
                pass
        self._read(self.ids[:self.chunk])
        for _ in self._decode(self.ids[-2:]):
            pass

    def _random(self) -> Run:
        """From an empty near memory."""
        runtime, n = self.loaded.runtime, self.sizes.prefill
        runtime.reset()
        before, start = runtime.counters(), time.perf_counter()
        self._read(self.ids[:n])
        self._wait()
        prefilled, first = time.perf_counter(), None
        for _ in self._decode(self.ids[n:]):
            if first is None:
                self._wait()
                first = time.perf_counter()
        self._wait()
        end = time.perf_counter()
        return Run(prefilled - start, first - start, end - prefilled, runtime.counters() - before)

    def _read(self, ids: list[int]) -> None:
        """Prefill from an empty cache."""
        self.decoder.prefix.reset()
        self.loaded.runtime.phase = "prefill" if self.decoder.on_device else "auto"
        for at in range(0, len(ids), self.chunk):
            self.decoder.prefix.feed(ids[at:at + self.chunk])

    def _decode(self, ids: list[int]) -> Iterator[Drawn]:
        """A step for each of the tokens, each drawn greedily; on a device the first of them is given, the others are
        drawn at random."""
        prefix = self.decoder.prefix
        if self.decoder.on_device:
            return self.decoder.tokens([*prefix.ids, ids[0]], RANDOM, None, frozenset(), len(ids))
        return self.decoder.retold(ids, GREEDY, None)

    @staticmethod
    def _median_of(runs: list[Run]) -> Run:
        """Medians of the times; every run counts the same bytes."""
        times = (median(getattr(run, name) for run in runs) for name in ("prefill", "first_token", "decode"))
        return Run(*times, runs[0].counters)

    def _own_text(self) -> tuple[dict, dict]:
        """Two answers in a row, drawn as the model recommends: the first from an empty near memory."""
        tokens = Tokens(self.loaded.tokenizer) if self.loaded.tokenizer.chat_template else None
        try:
            prompts = [self._question(tokens, text) for text in QUESTIONS]
        finally:
            if tokens:
                tokens.close()
        if not self._counts_apart:
            return self._answers(prompts)
        with self.loaded.runtime.hooked(self._picks):
            counted = self._answers(prompts)
        speed, timed = "decode_tokens_per_second", self._answers(prompts)
        return tuple(count | {speed: own[speed]} for own, count in zip(timed, counted, strict=True))

    def _answers(self, prompts: list[list[int]]) -> tuple[dict, ...]:
        self.loaded.runtime.reset()
        return tuple(self._answer(prompt) for prompt in prompts)

    def _question(self, tokens: Tokens | None, text: str) -> list[int]:
        plain = self.loaded.tokenizer
        ids = tokens.prompt([{"role": "user", "content": text}]).ids if tokens else plain(text).input_ids
        return ids[-self.sizes.prefill:]

    def _answer(self, prompt: list[int]) -> dict:
        """Decode on through end tokens, so that every run has the same length."""
        runtime, n = self.loaded.runtime, self.sizes.decode
        self._read(prompt[:-1])
        self._wait()
        recommended = getattr(self.loaded.model, "generation_config", None)
        before, start = runtime.counters(), time.perf_counter()
        for _ in self.decoder.tokens(prompt, Sampling(seed=0), recommended, frozenset(), n):
            pass
        seconds = time.perf_counter() - start
        return {"decode_tokens_per_second": n / seconds, **_per_token(runtime.counters() - before, n)}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def context_for(loaded: Loaded, sizes: Sizes) -> int:
    """What a cache must have room for; a device's the plan's context, as when the model is opened to chat."""
    runtime, least = loaded.runtime, sizes.prefill + sizes.decode + 1
    if not isinstance(runtime, DeviceRuntime):
        return least
    planned = loaded.planner.plan(runtime.level, Options(near_bytes=runtime.near_bytes)).context
    return max(least, min(loaded.spec.context, planned))


def _per_token(counters: Counters, n_tokens: int) -> dict:
    return {"hit_rate": counters.hit_rate, "far_bytes_per_token": counters.far_bytes / n_tokens}


# --- against transformers' own experts ------------------------------------------------------------------------------
def uncompressed(loaded: Loaded) -> nn.Module:
    """transformers' own model with the weights that far memory holds. UserError when they do not fit into memory."""
    far, ours = loaded.runtime.far, loaded.model
    n_bytes = far.layers * far.experts * 3 * far.neurons * far.hidden * 4
    if n_bytes > psutil.virtual_memory().available:
        raise UserError(f"The comparison holds all experts uncompressed, {n_bytes / 1e9:.1f} GB, more than is free; "
                        "choose a smaller model.")
    config = type(ours.config).from_dict({k: v for k, v in ours.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, dtype=ours.dtype)
    trunk = {name: plain(value) for name, value in ours.state_dict(keep_vars=True).items()}
    model.load_state_dict(trunk, strict=False)
    for path, module in experts_modules(model, loaded.spec.name).items():
        _fill(module, ours.get_submodule(path), far)
    return model.to(ours.device).eval()


@torch.no_grad()
def _fill(target: nn.Module, source: FloeExperts, far) -> None:
    """Write every expert of one layer in the layout that the module's flags describe."""
    layer, transposed = source.layer, target.is_transposed
    for expert in range(far.experts):
        gate_up, down = target.gate_up_proj[expert], target.down_proj[expert]
        gate, up = layer.halves(gate_up.T if transposed else gate_up)
        far.decode(layer.index, expert, gate, up, down if transposed else down.T)
    if layer.biases:
        target.gate_up_proj_bias.copy_(layer.gate_up_bias)
        target.down_proj_bias.copy_(layer.biases["down_bias"])


@torch.inference_mode()
def compare(loaded: Loaded, source: Loaded | None = None, report: Report = lambda text: None, rounds: int = ROUNDS,
            sizes: Sizes | None = None) -> list[dict]:
    """Ours ("floe", everything near) at the best level and at the one that is set, and each of transformers' own:
    medians of `rounds` interleaved runs. Every row names its level, "uncompressed" for theirs.

    source: the checkpoint whose weights transformers runs; without one they are those that far memory decodes to.
    """
    runtime = loaded.runtime
    levels = dict.fromkeys((runtime.levels[0], runtime.level))
    runtime.set_level(runtime.levels[0], loaded.planner.near_bytes(runtime.levels[0]))
    sizes = sizes or Sizes.of(getattr(loaded.model.config, "max_position_embeddings", None))
    prompt = torch.randint(loaded.model.config.vocab_size, (sizes.prefill,),
                           generator=torch.Generator().manual_seed(0)).tolist()
    theirs = uncompressed(source or loaded)
    ours, own = decoder_for(loaded.model, runtime, context_for(loaded, sizes)), HostDecoder(theirs)
    runs: dict[tuple[str, str], list[Run]] = {("floe", level): [] for level in levels}
    runs |= {(name, "uncompressed"): [] for name in _implementations(theirs, prompt, report)}
    for i in range(rounds + 1):  # the first warms up and does not count
        report(f"comparison: round {i} of {rounds}" if i else "comparison: warming up")
        for name, level in runs:
            if name == "floe":
                runtime.set_level(level, loaded.planner.near_bytes(level))
            else:
                theirs.set_experts_implementation(name)
            runtime.phase = "auto"
            run = _greedy(ours if name == "floe" else own, prompt, sizes.decode)
            if i:
                runs[name, level].append(run)
    return [{"implementation": name, "level": level,
             "prefill_tokens_per_second": sizes.prefill / median(run.prefill for run in found),
             "decode_tokens_per_second": sizes.decode / median(run.decode for run in found)}
            for (name, level), found in runs.items()]


def _implementations(model: nn.Module, prompt: list[int], report: Report) -> list[str]:
    """The names of transformers' experts implementations that run on this machine."""
    working = []
    for name in ("eager", *(name for name in ALL_EXPERTS_FUNCTIONS if name != EXPERTS)):
        try:
            model.set_experts_implementation(name)
            _greedy(HostDecoder(model), prompt[:8], 1)
        except Exception as error:  # whatever a package that is missing or a device that is too old raises
            report(f"{name} does not run here: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        else:
            working.append(name)
    return working


def _greedy(decoder: Decoder, prompt: list[int], n_decode: int) -> Run:
    """The prompt in one forward (a device reads its last token as a step), then the best token, one at a time."""
    decoder.prefix.reset()
    start = time.perf_counter()
    tokens = decoder.tokens(prompt, GREEDY, None, frozenset(), n_decode + 1)
    next(tokens)
    prefilled = time.perf_counter()
    for _ in tokens:
        pass
    return Run(prefilled - start, prefilled - start, time.perf_counter() - prefilled)
