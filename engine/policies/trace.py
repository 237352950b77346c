"""What a model's routers said while it wrote, as arrays that NumPy reads: the input of the simulator and of every
predictor that learns. One file, `.npz`, no pickle in it; `VERSION` says what the arrays mean.

Legend: N tokens in the order in which they were read, L MoE layers, E experts, k routed, h layers looked ahead, I
neurons of an expert, H hidden.
"""
from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.core import UserError

VERSION = 1
ARRAYS = ("token", "answer", "decode", "embedding", "logits", "ahead", "experts", "weights", "kept", "refined",
          "inputs")


@dataclass(frozen=True)
class RunNumbers:
    """What the run's near memory was made of. padded: numbers in a row of an expert's matrices. most_records: that a
    token may need, per layer; 0 where whole experts are near. plan: what a plan of the model is made from
    (engine/planning/), for speeds on other machines."""

    model: str
    level: str
    layers: int
    experts: int
    top_k: int
    neurons: int
    blob_bytes: int
    sketch_bytes: int
    record_bytes: int
    prefix_bytes: int
    padded: int
    most_records: tuple[int, ...]
    plan: dict

    def __post_init__(self) -> None:
        object.__setattr__(self, "most_records", tuple(self.most_records))
        sizes = (self.layers, self.experts, self.top_k, self.neurons, self.blob_bytes, self.sketch_bytes)
        assert all(type(n) is int and n > 0 for n in sizes) and self.top_k <= self.experts, self
        assert len(self.most_records) == self.layers, self

    @property
    def is_sparse(self) -> bool:
        return any(self.most_records)

    @property
    def record_bits(self) -> tuple[float, float]:
        """Bits that a record fetches for each weight of its neuron: as its prefix, and whole."""
        return 8 * self.prefix_bytes / (3 * self.padded), 8 * self.record_bytes / (3 * self.padded)

    @property
    def object_bytes(self) -> int:
        """Of what a step wants of a routed expert before anything else."""
        return self.sketch_bytes if self.is_sparse else self.blob_bytes


@dataclass(frozen=True)
class RoutingTrace:
    """decode bool [N]: read one token a step, else in prefill. answer int32 [N]: of which answer. embedding float16
    [N, H]. logits float32 [N, L, E]: of the layer's own router; ahead float32 [N, L, h, E]: of the routers 1..h
    layers on, on this layer's input, 0 behind the last. experts [N, L, k] and weights float32: the router's, best
    first where the model lists them so; weight 0: of an expert without weights, and any number stands for it. kept,
    refined uint8 [N, L, ceil(k*I/8)]: bits of the neurons that a sparse level's step chose (and refined), numbered
    through the k experts. inputs float16 [N, L, H], or none: [N, L, 0]."""

    run: RunNumbers
    token: np.ndarray
    answer: np.ndarray
    decode: np.ndarray
    embedding: np.ndarray
    logits: np.ndarray
    ahead: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    kept: np.ndarray
    refined: np.ndarray
    inputs: np.ndarray

    def __post_init__(self) -> None:
        n, run = len(self.token), self.run
        shapes = {"token": (n,), "answer": (n,), "decode": (n,), "logits": (n, run.layers, run.experts),
                  "experts": (n, run.layers, run.top_k), "weights": (n, run.layers, run.top_k)}
        for name, shape in shapes.items():
            found = getattr(self, name).shape
            _check(found == shape, f"{name} has the shape {list(found)} instead of {list(shape)}")
        bits = -(-run.top_k * run.neurons // 8) if run.is_sparse else 0
        _check(self.kept.shape == self.refined.shape == (n, run.layers, bits), "the neurons have another shape")
        _check(self.ahead.ndim == 4 and self.ahead.shape[:2] == (n, run.layers), "ahead has another shape")
        _check(n == 0 or int(self.experts.max()) < run.experts, "it names an expert that does not exist")

    def __len__(self) -> int:
        return len(self.token)

    @property
    def steps(self) -> np.ndarray:
        """int64 [n]: rows that were read one token a step."""
        return np.flatnonzero(self.decode)

    @property
    def horizon(self) -> int:
        return self.ahead.shape[2]

    def rows(self, chosen: np.ndarray) -> RoutingTrace:
        """Some of the tokens."""
        return RoutingTrace(self.run, **{name: getattr(self, name)[chosen] for name in ARRAYS})

    def of_answers(self, first: float, last: float) -> RoutingTrace:
        """The answers between two shares of all of them, 0..1."""
        n = int(self.answer.max()) + 1 if len(self) else 0
        return self.rows(np.flatnonzero((self.answer >= round(first * n)) & (self.answer < round(last * n))))

    def save(self, path: Path) -> None:
        told = np.frombuffer(json.dumps(vars(self.run)).encode(), np.uint8)
        with path.open("wb") as file:
            np.savez_compressed(file, version=np.int32(VERSION), run=told,
                                **{name: getattr(self, name) for name in ARRAYS})


def load_trace(path: Path) -> RoutingTrace:
    """UserError in one sentence for a file that is missing, damaged, or of another version."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            _check(int(stored["version"]) == VERSION, f"it is of version {int(stored['version'])}, not {VERSION}")
            run = RunNumbers(**json.loads(bytes(stored["run"])))
            return RoutingTrace(run, **{name: stored[name] for name in ARRAYS})
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); make a trace first: python -m engine "
                        "trace FOLDER --prompts FILE --out TRACE.") from error
    except (KeyError, ValueError, TypeError, AssertionError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no trace of this program or is damaged ({error}); record it again.") from error


def _check(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)
