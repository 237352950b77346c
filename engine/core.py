"""The nouns that every part shares: options, sampling, events, counters, the numbers of a model and of a machine.

Frozen and checked where they are born, so nobody downstream has to doubt them. No torch here, and no import of ours:
the page, the planner and the command line start with these alone.
"""
from __future__ import annotations

import math
import zlib
from array import array
from dataclasses import dataclass, field, fields

LEVELS = ("full", "exact", "quality", "balanced", "fast", "floe")
SPARSE_LEVELS = ("quality", "balanced", "fast", "floe")
# Promised perplexity over `exact`, as a fraction; calibration finds the budgets that keep it.
PROMISES = {"quality": 0.005, "balanced": 0.01, "fast": 0.03}

EVENT_KINDS = ("loading", "prefill", "thinking", "answer", "end")
END_REASONS = ("stop", "length", "stopped", "error")
MOST_PICKS_BYTES = 1 << 22  # of a Picks: more experts than any model has


class UserError(Exception):
    """Something the user can put right; the text is one sentence that says how (exit code 2)."""


class MachineError(Exception):
    """The machine failed: CUDA, memory, disk; the text is one sentence (exit code 3)."""


class Stopped(Exception):
    """The user stopped it; what has been made or has arrived stays."""


def never() -> bool:
    """Whether to stop, where nobody can ask for it."""
    return False


def _check(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


@dataclass(frozen=True)
class Options:
    """How a model is opened. `None` lets the plan decide.

    near_bytes: bytes of near memory for sketches, records or experts. context and chunk: tokens.
    device: "cpu" or "cuda"; predict: fetch ahead of the router (never changes the output). policies: as
    engine/policies/choice.py reads them, "" for the engine's own.
    """

    level: str | None = None
    near_bytes: int | None = None
    context: int | None = None
    chunk: int | None = None
    device: str | None = None
    predict: bool = True
    policies: str = ""

    def __post_init__(self) -> None:
        _check(self.level in (None, *LEVELS), f"There is no level {self.level!r}; choose one of {', '.join(LEVELS)}.")
        _check(self.device in (None, "cpu", "cuda"), f"There is no device {self.device!r}; choose cpu or cuda.")
        for name in ("near_bytes", "context", "chunk"):
            value = getattr(self, name)
            _check(value is None or (type(value) is int and value >= (0 if name == "near_bytes" else 1)),
                   f"{name} must be a positive whole number, not {value!r}.")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `None` takes the model's own recommendation (generation_config.json).

    temperature 0 is greedy. Ranges are those of transformers' logits processors; stop: texts that end the answer.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        self._range("temperature", "Temperature", 0, 10)
        self._range("top_p", "Top-p", 0, 1, low_open=True)
        self._range("min_p", "Min-p", 0, 1)
        self._range("repetition_penalty", "Repetition penalty", 0, 10, low_open=True)
        self._range("top_k", "Top-k", 0, 1_000_000)
        self._range("max_tokens", "Max response tokens", 1, 10_000_000)
        self._range("seed", "Seed", 0, 2**63 - 1)
        _check(all(isinstance(text, str) and text for text in self.stop), "Stop texts must be non-empty strings.")

    def _range(self, name: str, said: str, low: int, high: int, low_open: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        whole = name in ("top_k", "max_tokens", "seed")
        good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        good = good and math.isfinite(value) and low <= value <= high and not (low_open and value == low)
        bounds = f"above {low} and at most {high}" if low_open else f"{low}–{high:,}"
        _check(good, f"{said} must be {'a whole number, ' if whole else ''}{bounds}, not {value!r}.")


@dataclass(frozen=True)
class Request:
    """What a program may ask of an answer beside how it is drawn.

    schema: a JSON schema, as text, that the answer has to fulfil; "" for none. top_logprobs: how many of the likeliest
    tokens to tell at each place beside the one that was drawn; None tells nothing. owner: who asks; what was read for
    one owner is never reused for another.
    """

    schema: str = ""
    top_logprobs: int | None = None
    owner: str = ""

    def __post_init__(self) -> None:
        _check(self.top_logprobs is None or (type(self.top_logprobs) is int and 0 <= self.top_logprobs <= 20),
               f"Log probabilities are told of 0 to 20 tokens at each place, not {self.top_logprobs!r}.")


@dataclass(frozen=True)
class Likelihood:
    """A token of the answer, its log probability among all, and the likeliest tokens at its place with theirs."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for. arguments: a JSON document."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallPiece:
    """What one more token adds to call number `index` of an answer: its name, once, or a piece of its arguments."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Counters:
    """What crossed the link, in bytes, since some moment; subtract two to get what happened between them.

    needed: sketches, records or experts that the selection asked for. hit: the part that was near already.
    far: fetched on demand. speculative: fetched ahead. wasted: fetched ahead, evicted unused.
    dropped_weight: router weight of experts that were left out (always 0 under the exact policies).
    """

    needed_bytes: int = 0
    hit_bytes: int = 0
    far_bytes: int = 0
    speculative_bytes: int = 0
    wasted_bytes: int = 0
    dropped_weight: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the needed bytes that was near, 0..1; 0 when nothing was needed."""
        return self.hit_bytes / self.needed_bytes if self.needed_bytes else 0.0

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Picks:
    """How often each expert was picked, by the tokens of one answer or of all answers of a conversation. counts: layer
    by layer, layers * experts whole numbers."""

    layers: int
    experts: int
    tokens: int
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.layers, self.experts) < 1 or self.tokens < 0 or len(self.counts) != self.layers * self.experts:
            raise ValueError("these are not the picks of a model")

    def __add__(self, other: Picks) -> Picks:
        """ValueError for two models."""
        if (self.layers, self.experts) != (other.layers, other.experts):
            raise ValueError("two models have nothing in common")
        return Picks(self.layers, self.experts, self.tokens + other.tokens,
                     tuple(map(sum, zip(self.counts, other.counts, strict=True))))

    def shares(self) -> list[list[float]]:
        """Of each layer, for each expert the share of the tokens that picked it, 0 to 1."""
        n, tokens = self.experts, max(1, self.tokens)
        return [[round(pick / tokens, 3) for pick in self.counts[at:at + n]] for at in range(0, len(self.counts), n)]

    def busiest(self) -> list[tuple[int, int]]:
        """(layer, expert), what was picked most first; without what never was."""
        taken = [thing for thing, pick in enumerate(self.counts) if pick]
        return [divmod(thing, self.experts) for thing in sorted(taken, key=lambda thing: -self.counts[thing])]

    def packed(self) -> bytes:
        """What `unpacked` reads."""
        return zlib.compress(array("I", (self.layers, self.experts, self.tokens, *self.counts)).tobytes())

    @staticmethod
    def unpacked(data: bytes) -> Picks:
        """ValueError for anything else."""
        numbers = array("I")
        try:
            numbers.frombytes(zlib.decompressobj().decompress(data, MOST_PICKS_BYTES))
            layers, experts, tokens, *counts = numbers
        except (zlib.error, TypeError, ValueError) as error:
            raise ValueError("this was not packed here") from error
        return Picks(layers, experts, tokens, tuple(counts))


@dataclass(frozen=True)
class Event:
    """One step of an answer. Counters are those of the answer so far (decode only).

    likely: of the token that this step drew, where it was asked for. piece: of a call that is being written. calls: at
    the end, whole, of the tools that were offered.
    lossy: the policies by which the answer is not what the level's own arithmetic gives, "" where it is. picks: at the
    end, of the answer's tokens.
    """

    kind: str
    text: str = ""
    n_tokens: int = 0
    tokens_per_second: float = 0.0
    counters: Counters = field(default_factory=Counters)
    reason: str | None = None
    likely: Likelihood | None = None
    piece: CallPiece | None = None
    calls: tuple[ToolCall, ...] = ()
    lossy: str = ""
    picks: Picks | None = None

    def __post_init__(self) -> None:
        assert self.kind in EVENT_KINDS, self.kind
        assert (self.reason in END_REASONS) if self.kind == "end" else self.reason is None, self.reason


@dataclass(frozen=True)
class ModelSpec:
    """The numbers of a Mixture-of-Experts model that planning and storage need.

    layers: MoE layers (not all decoder layers). experts, top_k: routed ones; identities: more of them, without weights,
    that give back what they are given. neurons: intermediate channels of one expert. trunk_params: weights outside the
    routed experts; embedding_params: those of them that a token does not read (the input embedding, where it is not
    also the head). kv_bytes_per_token and state_bytes: 16-bit cache of all attention layers per token, and recurrent or
    sliding-window state that does not grow; recurrent_bytes: the part of that which recurrent layers hold; windows:
    (tokens, bytes of one) of each kind of sliding window in it. prefill: what one layer's mixer takes while a chunk of
    a prompt is read, for each kind of mixer (bytes for each token of the chunk, for each of the context, for each pair
    of both). table_bytes: of the rows that stand in place of experts in a Mixture of Lookup Experts; else 0.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    neurons: int
    hidden: int
    decoder_layers: int
    vocabulary: int
    trunk_params: int
    kv_bytes_per_token: int
    state_bytes: int
    context: int
    model_type: str = ""
    embedding_params: int = 0
    recurrent_bytes: int = 0
    prefill: tuple[tuple[int, int, int], ...] = ()
    windows: tuple[tuple[int, int], ...] = ()
    identities: int = 0
    table_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("prefill", "windows"):
            object.__setattr__(self, name, tuple(map(tuple, getattr(self, name))))
        for name in ("layers", "experts", "top_k", "neurons", "hidden", "decoder_layers", "vocabulary", "context"):
            _check(getattr(self, name) > 0, f"{self.name}: {name} must be positive, not {getattr(self, name)}.")
        _check(self.top_k <= self.experts, f"{self.name}: top_k {self.top_k} is larger than {self.experts} experts.")
        _check(self.trunk_params >= self.embedding_params >= 0 and self.kv_bytes_per_token >= 0
               and self.state_bytes >= 0, f"{self.name}: sizes must not be negative.")

    def state_bytes_at(self, context: int) -> int:
        """Of the state that does not grow: a window holds no more tokens than there are."""
        return self.state_bytes - sum(max(0, window - context) * each for window, each in self.windows)

    @property
    def expert_params(self) -> int:
        """Weights of one routed expert (gate, up and down)."""
        return 3 * self.hidden * self.neurons

    @property
    def n_experts_total(self) -> int:
        return self.layers * self.experts

    @property
    def picks(self) -> float:
        """Experts with weights that a token takes of a layer, where all that a router knows are picked alike."""
        return self.top_k * self.experts / (self.experts + self.identities)

    @property
    def active_params(self) -> int:
        """Weights that one token multiplies with."""
        experts = 0 if self.table_bytes else round(self.layers * self.picks * self.expert_params)
        return self.trunk_params - self.embedding_params + experts

    @property
    def token_table_bytes(self) -> int:
        """What a token reads of the table: its row."""
        return self.table_bytes // self.vocabulary


@dataclass(frozen=True)
class Machine:
    """One machine as plain numbers: what the planner may spend, in bytes and bytes per second.

    vram_*: 0 without a usable card. link: host to device. pinned_limit: what may be page-locked. Speeds are what is
    reached, not what is printed on the box. On a CPU the last five count: a copy in memory, a float32 matrix times a
    vector, one small tensor operation, packed experts times a token, packed weights decoded. 0 means not known.
    """

    name: str
    ram_total_bytes: int
    ram_free_bytes: int
    disk_free_bytes: int
    pinned_limit_bytes: int
    vram_total_bytes: int = 0
    vram_free_bytes: int = 0
    vram_bytes_per_second: float = 0.0
    link_bytes_per_second: float = 0.0
    copy_bytes_per_second: float = 0.0
    compute_capability: str = ""
    device: str = "cpu"
    flops_per_second: float = 0.0
    gemv_bytes_per_second: float = 0.0
    operation_seconds: float = 0.0
    packed_bytes_per_second: float = 0.0
    expert_flops_per_second: float = 0.0

    def __post_init__(self) -> None:
        _check(self.device in ("cpu", "cuda"), f"There is no device {self.device!r}; choose cpu or cuda.")
        for f in fields(self):
            value = getattr(self, f.name)
            _check(not isinstance(value, (int, float)) or value >= 0, f"{f.name} must not be negative, not {value!r}.")
