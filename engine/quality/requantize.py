"""Codes of a checkpoint that know what the weights are multiplied with: layer after layer, over a calibration text.

A layer sees what the layers below it really give, quantised as they are. Its trunk's matrices are compensated over
their inputs (engine/quality/compensate.py), gate and up over the inputs that are routed to their expert, down over the
activations that gate and up then give; an expert of few tokens takes the layer's other tokens into account, one of
none keeps the search without data. The 2-bit view is of the codes that came out, so sketch and record stay nested; its
scales are fitted over the same inputs. Where a compressed folder of the model is there, its gradients say which errors
of down an answer feels.
Memory: the walk's (layer_walk.py), the layer's inputs, a few experts with their Hessians, and of these gradients one
matrix [H, H] a layer.
"""
from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from engine.core import ModelSpec, Options, UserError
from engine.files.checkpoint import Checkpoint
from engine.files.compressed import ExpertsFile
from engine.files.folder_writer import FolderWriter, biases_of, blob_of
from engine.files.key_map import Group
from engine.files.manifest import TRUNK, experts_name
from engine.files.quantize import nested, padded
from engine.files.trunk import CODES, GROUP, SCALES, bits_of, encode, stored_as
from engine.model.gradients import felt
from engine.model.load import load, load_tokenizer
from engine.model.packed import Packed
from engine.progress import duration
from engine.quality.compensate import damp, fitted, over_inputs, over_neurons
from engine.quality.layer_walk import Reached, Walk
from engine.quality.loss_probe import Documents
from engine.quality.texts import LONGEST, read_tokens
from kernels.layout import Layout, default_group_size
from kernels.planes import Nested, decode_down, decode_gate, decode_up

Tensor = torch.Tensor
PRIOR = 64      # tokens that the layer's own mean counts as beside an expert's tokens
SAMPLE = 1024   # tokens of a layer that stand for all of them where an expert's activations are asked for
AT_ONCE = 1 << 24       # weights of down of the experts that are compensated together
FELT_TOKENS = 8192      # whose gradients are asked for
PASSES = 3      # of a layer over each token; as much is a forward with its gradients
FELT_DAMPING = 0.1      # of the mean of their second moments' diagonal, added to it; more where tokens are few


@dataclass(frozen=True)
class Routed:
    """What one layer's experts were given: x float32 [T, H], ids [T, k], weights float32 [T, k]."""

    x: Tensor
    ids: Tensor
    weights: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Its tokens x [n, H] and their weights [n]."""
        token, place = (self.ids == expert).nonzero(as_tuple=True)
        return self.x[token], self.weights[token, place]

    @property
    def sample(self) -> Tensor:
        return self.x[::max(1, len(self.x) // SAMPLE)]


@dataclass(frozen=True)
class Begun:
    """An expert whose gate and up are codes already. down: float32 [I, H], and the Hessian of its activations [I, I];
    no Hessian: down is codes, too."""

    views: list[Nested]
    down: Tensor | Nested
    hessian: Tensor | None
    biases: dict[str, Tensor]


@dataclass(frozen=True)
class Text:
    """What codes are compensated on. paths: as of `read_tokens`, none: they are not; n_tokens: of all together. model:
    a compressed folder of the same model, whose gradients say what of an error an answer feels."""

    paths: tuple[Path, ...] = ()
    n_tokens: int = 0
    model: Path | None = None

    def documents(self, folder: Path) -> Documents:
        """In the tokens of the model in `folder`. UserError."""
        tokenizer = load_tokenizer(folder) if self.paths else None
        return [torch.tensor([ids]) for path in self.paths
                for ids in read_tokens(path, tokenizer, max(1, self.n_tokens // len(self.paths)), LONGEST)]


NO_TEXT = Text()


def digest(documents: Documents, model: Path | None = None) -> str:
    """A name for what codes were compensated on."""
    own = hashlib.sha256(repr([ids.tolist() for ids in documents]).encode()).hexdigest()[:16]
    return f"{own}, felt" if model else own


def expected(spec: ModelSpec, documents: Documents, device: str, has_model: bool) -> str:
    """How long it is likely to take here, with the model to ask where there is none yet: one made-up expert of the
    model's shape is tried."""
    draw, layout = torch.Generator().manual_seed(0), Layout(spec.hidden, spec.neurons, default_group_size(spec.hidden))
    gate_up, down = (torch.randn(n, spec.hidden, generator=draw).to(device) for n in (2 * spec.neurons, spec.neurons))
    n_tokens = sum(ids.numel() for ids in documents)
    x = gate_up[:max(1, min(len(gate_up), n_tokens * spec.top_k // spec.experts))]
    begun = time.monotonic()
    over_inputs(gate_up, x.T @ x, layout.group)
    over_neurons(down[None], ((x @ down.T).T @ (x @ down.T))[None], down.T @ down, layout.group)[0].cpu()
    for matrix in () if has_model else (*gate_up.chunk(2), down):
        nested(matrix, layout)
    seconds = (time.monotonic() - begun) * spec.layers * spec.experts
    per_token = 2 * (spec.trunk_params + spec.layers * spec.top_k * spec.neurons * spec.hidden)
    begun = time.monotonic()
    (down @ down.T @ down).cpu()
    seconds += (PASSES * per_token * (n_tokens + min(n_tokens, FELT_TOKENS)) * (time.monotonic() - begun)
                / (4 * spec.neurons ** 2 * spec.hidden))
    return (f"{n_tokens:,} tokens go through {spec.decoder_layers} layers and {spec.layers * spec.experts:,} experts: "
            f"about {duration(seconds)} on this {'card' if device != 'cpu' else 'processor'}.")


class Requantizer:
    """Works on one unit after the other: `outside` what the layers need, then `layer` 0, 1, ...; what an earlier run
    has finished is only read, when the first layer that is not done needs it. check: called between two documents and
    two experts, may raise."""

    def __init__(self, checkpoint: Checkpoint, writer: FolderWriter, documents: Documents, device: str,
                 check: Callable[[], None], model: Path | None) -> None:
        """model: as of `Text`."""
        self.checkpoint, self.writer, self.check, self.layout = checkpoint, writer, check, writer.layout
        self.model = model
        self.walk = Walk(checkpoint, _Biases(checkpoint, writer), documents, device)

    @cached_property
    def felt(self) -> Tensor:
        """[L, H, H], of some documents of each text: see engine/model/gradients.py."""
        few = _spread(self.walk.documents, FELT_TOKENS)
        with torch.inference_mode(False):
            loaded = load(self.model, Options(level="exact", device=self.walk.device, predict=False))
            try:
                loaded.runtime.set_level("exact", loaded.runtime.smallest_bytes())
                return felt(loaded.model, loaded.runtime, few, self.check)
            finally:
                loaded.runtime.close()

    def has(self, groups: list[Group]) -> bool:
        """Whether the trunk holds all that these conversions make."""
        names = [name for group in groups for name in group.targets]
        return TRUNK in self.writer.done or all(name in self.writer.trunk for name in names)

    def is_done(self, n: int) -> bool:
        index = self.index(n)
        return self.has(self.walk.within[n]) and (index is None or experts_name(index) in self.writer.done)

    def outside(self, group: Group) -> None:
        """A part of the trunk beside the layers: nothing is compensated. What only the logits need, a head above all,
        is no part of the walk: in float32 it would be the largest tensor of all in memory."""
        self.check()
        for name, tensor in self.checkpoint.read_group(group).items():
            parts = encode(name, tensor, self._bits(name, tensor))
            self._store(name, parts)
            if group in self.walk.before:
                self._walk_with(name, parts)

    @torch.inference_mode()
    def layer(self, n: int) -> None:
        """UserError for weights that are not finite."""
        if self.walk.at < 0:
            for group in self.walk.before:
                self._put_back(group)
        for earlier in range(self.walk.at + 1, n):
            self.walk.open(earlier, {})
            for group in self.walk.within[earlier]:
                self._put_back(group)
            self._leave(earlier)
        trunk = {name: tensor for group in self.walk.within[n]
                 for name, tensor in self.checkpoint.read_group(group).items()}
        self.walk.open(n, trunk)
        self._trunk(trunk)
        self._leave(n)

    def _leave(self, n: int) -> None:
        """The experts of the open layer, unless they are done, and what the layer gives with them."""
        if self.walk.experts is None:
            self.walk.leave(list(self.walk.send(_nothing)))
            return
        routed, index = self._routed(), self.walk.experts.index
        if experts_name(index) not in self.writer.done:
            self.writer.layer(index, self._blobs(index, routed))
        given = iter(self._outputs(index, routed).split([ids.shape[1] for ids in self.walk.documents]))
        self.walk.leave(list(self.walk.send(lambda x, ids, weights: next(given))))

    def index(self, n: int) -> int | None:
        """Which of the layers of experts is in decoder layer n."""
        return next((i for i, path in enumerate(self.checkpoint.expert_layers) if f".layers.{n}." in path), None)

    # --- trunk --------------------------------------------------------------------------------------------------
    def _trunk(self, stored: dict[str, Tensor]) -> None:
        """The open layer's, compensated where it is a product with inputs and not kept at 16 bits."""
        hessians = self._hessians({name: module for name, module in self.walk.linears().items()
                                   if name in stored and self._bits(name, stored[name]) < 16})
        for name, tensor in stored.items():
            self.check()
            bits = self._bits(name, tensor)
            if name in hessians and torch.isfinite(tensor).all():
                weight = tensor.to(self.walk.device).float()
                self._keep(name, stored_as(name, *over_inputs(weight, hessians[name], GROUP, bits), bits))
            else:
                self._keep(name, encode(name, tensor, bits))

    def _hessians(self, linears: dict[str, nn.Linear]) -> dict[str, Tensor]:
        """Of each module's inputs, where the experts give nothing."""
        sums, handles = {}, []
        for name, module in linears.items():
            def see(module: nn.Module, given: tuple[Tensor], name: str = name) -> None:
                x = given[0].flatten(0, -2)
                sums[name] = sums.get(name, 0) + x.T @ x
            handles.append(module.register_forward_pre_hook(see))
        for _ in self.walk.send(_nothing) if linears else ():
            self.check()
        for handle in handles:
            handle.remove()
        return sums

    def _keep(self, name: str, parts: dict[str, Tensor]) -> None:
        """Into the trunk, and the walk goes on with what is stored."""
        self._store(name, parts)
        self._walk_with(name, parts)

    def _store(self, name: str, parts: dict[str, Tensor]) -> None:
        if TRUNK not in self.writer.done and name not in self.writer.trunk:
            self.writer.trunk.add(parts)

    @torch.inference_mode(False)        # in which a packed tensor would be decoded to be moved
    def _walk_with(self, name: str, parts: dict[str, Tensor]) -> None:
        self.walk.put(name, parts[name] if name in parts else
                      Packed(parts[name + CODES], parts[name + SCALES], torch.float32))

    def _put_back(self, group: Group) -> None:
        """What an earlier run has stored of the trunk, into the walk."""
        read, header = self.writer.trunk.read, self.writer.trunk.writer.header
        for name in group.targets:
            self._walk_with(name, {part: read(part) for part in (name, name + CODES, name + SCALES) if part in header})

    def _bits(self, name: str, tensor: Tensor) -> int:
        return bits_of(name, tensor, self.writer.trunk_bits, self.writer.spec.decoder_layers)

    # --- experts ------------------------------------------------------------------------------------------------
    def _routed(self) -> Routed:
        seen = []

        def at_experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            seen.append((x.float(), ids, weights.float()))
            raise Reached
        for _ in self.walk.send(at_experts):
            self.check()
        return Routed(*map(torch.cat, zip(*seen, strict=True)))

    def _blobs(self, index: int, routed: Routed) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        shared, felt = routed.x.T @ routed.x / len(routed.x), self._felt(index)
        step = max(1, AT_ONCE // (self.layout.neurons * self.layout.hidden))
        for first in range(0, self.writer.spec.experts, step):
            some = [self._begun(index, e, routed, shared)
                    for e in range(first, min(first + step, self.writer.spec.experts))]
            open_ones = [each for each in some if each.hessian is not None]
            downs = iter(self._downs(open_ones, felt) if open_ones else ())
            for each in some:
                down = each.down if each.hessian is None else next(downs)
                yield blob_of(*each.views, down, self.layout), each.biases

    def _felt(self, index: int) -> Tensor:
        """Second moments [H, H] of what an answer feels of a layer's output; unknown: of all directions alike."""
        hidden, device = self.layout.hidden, self.walk.device
        if self.model is None:
            return torch.eye(hidden, device=device)
        moments = self.felt[index].to(device, copy=True)
        n_tokens = sum(ids.numel() for ids in _spread(self.walk.documents, FELT_TOKENS))
        damping = max(FELT_DAMPING, hidden / n_tokens)
        moments.diagonal().add_(damping * moments.diagonal().mean().clamp_min(1e-30))
        return moments

    def _downs(self, some: list[Begun], felt: Tensor) -> Iterator[Nested]:
        found = over_neurons(torch.stack([each.down for each in some]), torch.stack([each.hessian for each in some]),
                             felt, self.layout.group)
        return (padded(codes, fine, fine, self.layout) for codes, fine in zip(*found, strict=True))

    def _begun(self, index: int, e: int, routed: Routed, shared: Tensor) -> Begun:
        """UserError for weights that are not finite."""
        self.check()
        expert = self.checkpoint.read_expert(index, e)
        gate, up, down = (matrix[0].to(self.walk.device).float() for matrix in (expert.gate, expert.up, expert.down))
        x, weights = routed.of(e)
        try:
            if not len(x) or not all(torch.isfinite(matrix).all() for matrix in (gate, up, down)):
                *views, down = (nested(matrix, self.layout, self.check) for matrix in (gate, up, down))
                return Begun(views, down, None, biases_of(expert))
        except ValueError as error:
            raise UserError(f"Expert {e} of MoE layer {index:05d} cannot be compressed: {error}; get an intact "
                            "checkpoint.") from error
        rest = PRIOR * weights.square().mean()
        views = self._views(gate, up, (x * weights[:, None]).T @ (x * weights[:, None]) + rest * shared)
        own, others = (self._product(e, inputs, views) for inputs in (x, routed.sample))
        hessian = (own * weights[:, None]).T @ (own * weights[:, None]) + rest / len(others) * (others.T @ others)
        return Begun(views, down, hessian, biases_of(expert))

    def _views(self, gate: Tensor, up: Tensor, hessian: Tensor) -> list[Nested]:
        both, group = torch.cat((gate, up)), self.layout.group
        codes, fine = over_inputs(both, hessian, group)
        coarse = fitted(codes >> 2, both, damp(hessian), group)
        return [padded(*parts, self.layout) for parts in zip(codes.chunk(2), coarse.chunk(2), fine.chunk(2),
                                                             strict=True)]

    def _product(self, e: int, x: Tensor, views: list[Nested]) -> Tensor:
        """x [n, H] -> act(g) * u [n, I] at the 4-bit view."""
        layer, hidden = self.walk.experts, self.layout.hidden
        sides = []
        for view, name in zip(views, ("gate_bias", "up_bias"), strict=True):
            scale, offset = view.fine.float().split(1, -1)
            values = torch.addcmul(offset, view.codes.unflatten(1, (-1, self.layout.group)).float(), scale).flatten(1)
            sides.append(x @ values[:, :hidden].T + (layer.biases[name][e] if layer.biases else 0.0))
        return layer.gate(*sides)

    def _outputs(self, index: int, routed: Routed) -> Tensor:
        """What the layer's experts give as they are in the file [T, H]."""
        file, layer = ExpertsFile(self.writer.dest / experts_name(index)), self.walk.experts
        out = torch.zeros_like(routed.x)
        for e in range(self.writer.spec.experts):
            self.check()
            file.verify(e)
            token, place = (routed.ids == e).nonzero(as_tuple=True)
            if not len(token):
                continue
            views = _values(file.blobs[e].to(self.walk.device), self.layout)
            gate, up, down = (matrix[:, :self.layout.hidden] for matrix in views)
            y = layer.whole(routed.x[token], layer.join(gate.T, up.T).T, down, e)
            out.index_add_(0, token, y * routed.weights[token, place, None])
        return out


class _Biases:
    """What a layer asks of far memory: one that is done has its biases from its file, its original may be gone."""

    def __init__(self, checkpoint: Checkpoint, writer: FolderWriter) -> None:
        self.checkpoint, self.writer = checkpoint, writer
        self.experts, self.hidden = writer.spec.experts, writer.spec.hidden

    def biases(self, layer: int) -> dict[str, Tensor]:
        if experts_name(layer) in self.writer.done:
            return ExpertsFile(self.writer.dest / experts_name(layer)).biases
        if not biases_of(self.checkpoint.read_expert(layer, 0)):
            return {}                               # a whole layer need not be read to see that
        return biases_of(self.checkpoint.read_layer(layer))


def _spread(documents: Documents, n_tokens: int) -> Documents:
    """Some of them, from the first to the last, with about n_tokens together."""
    step = max(1, sum(ids.numel() for ids in documents) // n_tokens)
    return documents[::step]


def _values(blob: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    sketch = blob[:layout.neurons * layout.sketch_row].view(layout.neurons, -1)
    records = blob[layout.sketch_bytes:].view(layout.neurons, -1)
    return decode_gate(sketch, records, layout), decode_up(sketch, records, layout), decode_down(records, layout)


def _nothing(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros_like(x)
