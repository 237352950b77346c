"""Predictors that are trained on a trace: FloE's two layers behind each layer's input (arXiv 2505.05950), and SiDA's
sequence network over token embeddings (arXiv 2310.18859), here for generation: its attention looks back only.

Both only say what to fetch ahead. Stored as safetensors, nothing else in the file is read.

Legend: N tokens, L layers, E experts, H hidden, D width of a network.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from engine.core import UserError
from engine.policies.predict import Predictor
from engine.policies.trace import RoutingTrace

Tensor = torch.Tensor
WIDTH = 128
RATE = 3e-3
ROW = 64                    # tokens of an answer that are trained on together
LOOKS_BACK = 64             # tokens that the sequence network's attention sees
TRUNCATED, LAMBDA = 30, 0.005  # of SiDA's loss: logits of the teacher, and the weight of the cross entropy
Report = Callable[[str, float], None]


class TwoLayers(nn.Module, Predictor):
    """Layer l's input -> which experts layer l + 1 takes."""

    reads = frozenset({"input"})

    def __init__(self, layers: int, experts: int, hidden: int, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(layers - 1, hidden, width) / hidden ** 0.5)
        self.second = nn.Parameter(torch.randn(layers - 1, width, experts) / width ** 0.5)
        self.bias = nn.Parameter(torch.zeros(layers - 1, 1, experts))

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, L, H] -> logits [N, L - 1, E] of layers 1 .. L - 1."""
        x = F.rms_norm(inputs[:, :-1].transpose(0, 1), inputs.shape[-1:])
        return (F.silu(x @ self.first) @ self.second + self.bias).transpose(0, 1)

    def layer(self, at: int, ahead: Tensor, logits: Tensor, x: Tensor) -> tuple[int, Tensor] | None:
        if at >= len(self.first):
            return None
        hidden = F.silu(F.rms_norm(x, x.shape) @ self.first[at])
        return at + 1, hidden @ self.second[at] + self.bias[at, 0]


class SequenceNetwork(nn.Module, Predictor):
    """Embeddings so far -> experts of all layers: compression, two LSTM layers, sparsemax attention without
    projections, a head a layer."""

    reads = frozenset({"embedding"})

    def __init__(self, layers: int, experts: int, hidden: int, width: int = WIDTH) -> None:
        super().__init__()
        self.compression, self.residual = nn.Linear(hidden, width), nn.Linear(width, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.heads = nn.Linear(width, layers * experts)
        self._shape = layers, experts
        self.start()

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, N, H] -> logits [B, N, L, E]."""
        z = F.relu(self.compression(_scaled(embeddings)))
        y, _ = self.lstm(z)
        hidden = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool, device=y.device)
        hidden = hidden.triu(1) | hidden.tril(-LOOKS_BACK)
        attended = sparsemax((y @ y.transpose(1, 2)).masked_fill(hidden, -1e9)) @ y
        return self.heads(attended + self.residual(z)).unflatten(-1, self._shape)

    def start(self) -> None:
        self._state, self._past = None, None

    def begin(self, embedding: Tensor) -> Tensor:
        z = F.relu(self.compression(_scaled(embedding[None])))
        y, self._state = self.lstm(z, self._state)
        self._past = y if self._past is None else torch.cat((self._past, y))[-LOOKS_BACK:]
        attended = sparsemax(y @ self._past.T) @ self._past
        return self.heads(attended + self.residual(z))[0].unflatten(-1, self._shape)


def _scaled(embeddings: Tensor) -> Tensor:
    return F.rms_norm(embeddings, embeddings.shape[-1:])


def sparsemax(scores: Tensor) -> Tensor:
    """The nearest point of the simplex (Martins and Astudillo 2016), along the last dimension."""
    ordered = scores.sort(-1, descending=True).values
    steps = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    sums = ordered.cumsum(-1) - 1
    support = (steps * ordered > sums).sum(-1, keepdim=True)
    return (scores - sums.gather(-1, support - 1) / support).clamp_min(0)


def truncated_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """SiDA's loss: L1 between both softmaxes over the teacher's largest logits, and a little cross entropy; [.., E]."""
    best = teacher.topk(min(TRUNCATED, teacher.shape[-1]), -1).indices
    near = F.l1_loss(student.gather(-1, best).softmax(-1), teacher.gather(-1, best).softmax(-1), reduction="none")
    right = F.cross_entropy(student.flatten(0, -2), teacher.argmax(-1).flatten())
    return near.sum(-1).mean() + LAMBDA * right


def fit(trace: RoutingTrace, epochs: int = 20, report: Report = lambda text, share: None,
        ) -> dict[str, Predictor]:
    """Both networks, from the decode steps of a trace. UserError for a trace without inputs, or too short a one."""
    run, steps = trace.run, trace.steps
    if len(steps) < ROW:
        raise UserError(f"{len(steps)} written tokens are too few to learn from; record more than {ROW}.")
    if not trace.inputs.shape[2]:
        raise UserError("This trace lacks what each layer was given; record it with --inputs.")
    torch.manual_seed(0)
    hidden = trace.embedding.shape[1]
    made: dict[str, Predictor] = {"learned": TwoLayers(run.layers, run.experts, hidden),
                                  "sequence": SequenceNetwork(run.layers, run.experts, hidden)}
    inputs, picks = torch.from_numpy(trace.inputs[steps]).float(), torch.from_numpy(trace.experts[steps]).long()
    counts = torch.from_numpy(trace.weights[steps] != 0).float()
    wanted = torch.zeros(len(steps), run.layers, run.experts).scatter_add_(2, picks, counts)
    network, batches = made["learned"], list(torch.arange(len(steps)).split(256))
    _descend(network, batches, epochs, lambda rows: F.binary_cross_entropy_with_logits(
        network(inputs[rows]), wanted[rows, 1:]), report, "learned")
    embeddings = torch.from_numpy(trace.embedding[steps]).float()
    teacher = torch.from_numpy(trace.logits[steps])
    rows = [torch.from_numpy(row) for row in _rows(trace)]
    sequence = made["sequence"]
    _descend(sequence, rows, epochs, lambda row: truncated_distillation(
        sequence(embeddings[row][None])[0], teacher[row]), report, "sequence")
    return {name: network.eval().requires_grad_(False) for name, network in made.items()}


def _rows(trace: RoutingTrace) -> list[np.ndarray]:
    """Numbers of steps, answer by answer, no more than ROW together."""
    answers = trace.answer[trace.steps]
    cuts = np.flatnonzero(np.diff(answers)) + 1
    return [part[at:at + ROW] for part in np.split(np.arange(len(answers)), cuts) for at in range(0, len(part), ROW)]


def _descend(network: nn.Module, batches: list[Tensor], epochs: int, loss: Callable[[Tensor], Tensor],
             report: Report, name: str) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    for epoch in range(epochs):
        for batch in torch.randperm(len(batches)).tolist():
            optimizer.zero_grad()
            loss(batches[batch]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        report(name, (epoch + 1) / epochs)


def save_predictors(path: Path, made: dict[str, Predictor], layers: int, experts: int, hidden: int) -> None:
    tensors = {f"{name}.{key}": value.half().contiguous() for name, network in made.items()
               for key, value in network.state_dict().items()}
    save_file(tensors, path, {"layers": str(layers), "experts": str(experts), "hidden": str(hidden)})


def load_predictors(path: Path) -> dict[str, Predictor]:
    """UserError for a file that is not one of `save_predictors`."""
    try:
        with safe_open(path, "pt") as file:
            numbers = [int(file.metadata()[name]) for name in ("layers", "experts", "hidden")]
            made: dict[str, Predictor] = {"learned": TwoLayers(*numbers), "sequence": SequenceNetwork(*numbers)}
            stored = {key: file.get_tensor(key).float() for key in file.keys()}
        for name, network in made.items():
            network.load_state_dict({key.removeprefix(f"{name}."): value for key, value in stored.items()
                                     if key.startswith(f"{name}.")})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds no predictors of this program, or is damaged; train them again: python -m "
                        "engine fit-predictor FOLDER TRACE --out FILE.") from error
    return {name: network.eval().requires_grad_(False) for name, network in made.items()}
