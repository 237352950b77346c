"""What an answer costs a token on its way to a reader: text, events, counters, and the queue between two threads.

The engine answers as it answers the page, and the bare decoder writes the same tokens, greedily and in turns, in one
process. Its processor time counts, of all of its threads, so that other programs do not. And where the time of a bare
token goes, where it is one compiled call. Prints nothing.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from statistics import median

import torch

from engine.bench.throughput import GREEDY, QUESTIONS, ROUNDS, Sizes
from engine.chat.engine import Engine
from engine.chat.tokenizer import Tokens
from engine.core import Options, Sampling, UserError
from engine.decode.decoder import HostDecoder
from engine.decode.step import Drawn
from engine.model.load import Loaded
from kernels import dispatch

Report = Callable[[str], None]
PRODUCTS = frozenset({"_multiply", "_score", "_add_neurons", "_add_pieces", "_scan_all", "_compute"})
ATTENTION = frozenset({"_attend", "_part", "_recur"})


def overhead(loaded: Loaded, options: Options, report: Report = lambda text: None, rounds: int = ROUNDS,
             sizes: Sizes | None = None) -> dict[str, float]:
    """Milliseconds of processor time a token: through the engine, bare, and what the first has more; medians. The model
    is closed behind it. On the processor: a device's step ahead of its reader hides what a reader costs."""
    sizes, found = sizes or Sizes.of(loaded.spec.context), []
    greedy = Sampling(0.0, 0, 1.0, 0.0, 1.0, max_tokens=sizes.decode)
    asked = [{"role": "user", "content": QUESTIONS[0]}] if loaded.tokenizer.chat_template else QUESTIONS[0]
    with closing(Tokens(loaded.tokenizer)) as tokens:
        ids = tokens.prompt(asked).ids
    bare = HostDecoder(loaded.model)
    with Engine(loaded, options) as engine:
        for i in range(rounds + 1):     # the first warms up and does not count
            report(f"the stream: round {i} of {rounds}" if i else "the stream: warming up")
            n, streamed = _streamed(engine, asked, greedy)
            loaded.runtime.phase = "auto"       # else the prompt would be read as steps
            alone = _alone(bare, ids, greedy, n)
            found += [(streamed, alone)] if i else []
    streamed, alone = (1e3 * median(times) for times in zip(*found, strict=True))
    return {"streamed_ms": streamed, "bare_ms": alone, "overhead_ms": streamed - alone}


def _streamed(engine: Engine, asked: list[dict] | str, sampling: Sampling) -> tuple[int, float]:
    """Tokens of an answer, and seconds of each but the first."""
    begun = None
    for event in engine.chat(asked, sampling):
        if begun is None and event.kind in ("thinking", "answer"):
            begun = time.process_time()
    if begun is None or event.n_tokens < 2:
        raise UserError("This model ends its answer at once; measure the stream with another one.")
    return event.n_tokens, (time.process_time() - begun) / (event.n_tokens - 1)


@torch.inference_mode()
def _alone(decoder: HostDecoder, ids: list[int], sampling: Sampling, n: int) -> float:
    """Seconds of each of n tokens but the first."""
    decoder.prefix.reset()
    decoder.prefix.feed(ids[:-1])
    drawn = decoder.tokens(ids, sampling, None, frozenset(), n)
    next(drawn)
    begun = time.process_time()
    for _ in drawn:
        pass
    return (time.process_time() - begun) / (n - 1)


@torch.inference_mode()
def parts(loaded: Loaded, sizes: Sizes | None = None) -> dict[str, float]:
    """Milliseconds of a token: "products", "attention", and "rest", which is norms, rotations, routers, choices, Python
    and the sampler; medians. Empty where a token is not one compiled call. Every token is read twice, so that the
    second time nothing is waited for."""
    if dispatch.compile_all():
        return {}
    sizes, decoder, found = sizes or Sizes.of(loaded.spec.context), HostDecoder(loaded.model), []
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(loaded.model.config.get_text_config().vocab_size, (2, sizes.decode), generator=draw).tolist()
    loaded.runtime.phase = "auto"
    for is_second in (False, True):
        decoder.prefix.reset()
        decoder.prefix.feed(ids[0])
        for drawn in _watched(decoder.retold(ids[1], GREEDY, None)):
            found += [drawn] if is_second else []
    if not all(token["attention"] for token in found):
        return {}
    return {kind: 1e3 * median(token[kind] for token in found) for kind in found[0]}


def _watched(drawn: Iterator[Drawn]) -> Iterator[dict[str, float]]:
    """Seconds of each token by kind of work."""
    from kernels.cpu.program import Program
    token: dict[str, float] = {}

    def watch(task: str, seconds: float) -> None:
        kind = "products" if task in PRODUCTS else "attention" if task in ATTENTION else "rest"
        token[kind] += seconds
    Program.watch = staticmethod(watch)
    try:
        while True:
            token.update(products=0.0, attention=0.0, rest=0.0)
            begun = time.perf_counter()
            if next(drawn, None) is None:
                return
            token["rest"] = time.perf_counter() - begun - token["products"] - token["attention"]
            yield dict(token)
    finally:
        Program.watch = None
