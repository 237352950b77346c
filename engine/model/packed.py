"""A large matrix of the trunk that stays in the codes of its file while transformers' own modules use it.

`Packed` is a tensor as far as a module can tell: shape, type and device are those of the weight, and it is tied, moved
and copied like one. Where a module multiplies with it (`F.linear`, whatever the module is) a few tokens are computed
from the codes, and more of them from tiles that are decoded into scratch; where it looks rows up (`F.embedding`), those
rows are decoded. Any other operation gets the whole matrix, decoded for it alone: right, and slow.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from engine.planning.sizes import NESTED_FROM
from kernels.trunk.head import best_rows, split
from kernels.trunk.linear import MOST_TOKENS, Matrices, columns, decode, dequantize_rows, linear, linears

Tensor = torch.Tensor

TILE_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}  # of scratch: what a processor's cache holds; few launches of a card
_aten = torch.ops.aten
_COPIES = {_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten._to_copy.default}


class Packed(Tensor):
    """codes, scales: as of kernels/trunk/linear.py; dtype: what it passes for, and what its rows are decoded to."""

    codes: Tensor
    scales: Tensor
    alone: Matrices  # what a processor knows of it from one token to the next

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Packed:
        self = Tensor._make_wrapper_subclass(cls, (len(codes), columns(codes)), dtype=dtype, device=codes.device)
        self.codes, self.scales = codes, scales
        self.alone = Matrices(((codes, scales, None),))
        return self

    @property
    def packed_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def mapped_bytes(self) -> int:
        """Of these, what may lie where a file is mapped: a nested head's codes were copied."""
        return self.scales.nbytes if self.alone.is_nested else self.packed_bytes

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        own = _OWN.get(function)
        if own is not None and isinstance(args[1], Packed):
            return own(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _COPIES:
            return _copied(function, args[0], kwargs)
        args, kwargs = tree_map(plain, (args, kwargs))
        return function(*args, **kwargs)

    def __repr__(self, **_) -> str:
        return f"Packed({tuple(self.shape)}, {8 * self.packed_bytes / self.numel():.2f} bits, {self.device})"


def packed_parameter(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(Packed(codes, scales, dtype), requires_grad=False)


def nest_head(model: nn.Module) -> None:
    """Bring the 8-bit codes of a large head into two planes, as of kernels/trunk/head.py, in memory of their own: what
    was mapped of them is read no more."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = head.weight
    if not isinstance(weight, Packed) or weight.codes.dtype != torch.int8 or getattr(head, "bias", None) is not None:
        return
    if weight.codes.nbytes >= NESTED_FROM and weight.codes.is_contiguous():
        is_tied = getattr(embedding, "weight", None) is weight      # one left on the host has none
        head.weight = packed_parameter(split(weight.codes), weight.scales, weight.dtype)
        if is_tied:
            embedding.weight = head.weight


def stored_bytes(parameter: Tensor) -> int:
    """What a parameter takes in memory, packed or not."""
    return parameter.packed_bytes if isinstance(parameter, Packed) else parameter.nbytes


def plain(value):
    """A packed tensor decoded to what it passes for; anything else as it is."""
    return decode(value.codes, value.scales).to(value.dtype) if isinstance(value, Packed) else value


def _copied(function, weight: Packed, kwargs: dict) -> Packed:
    """Another type is only another face; what is copied or moved are the codes."""
    dtype = kwargs.pop("dtype", None) or weight.dtype
    return Packed(function(weight.codes, **kwargs), function(weight.scales, **kwargs), dtype)


def _linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., K] -> [..., R]; what reaches it by a gradient goes through."""
    if torch.is_grad_enabled() and (x.requires_grad or bias is not None and bias.requires_grad):
        return _Linear.apply(x, weight.codes, weight.scales, bias, weight)
    return _product(x, weight, bias)


class _Linear(torch.autograd.Function):
    """The codes and scales do not learn."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, weight: Packed) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Tile by tile: a head in float32 would be the largest tensor of all in memory."""
        codes, scales = ctx.saved_tensors
        step = max(1, TILE_BYTES[grad.device.type] // (columns(codes) * grad.element_size()))
        of_x = sum(part @ decode(codes[at:at + step], scales[at:at + step]).to(grad.dtype)
                   for at, part in zip(range(0, len(codes), step), grad.split(step, -1), strict=True))
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return of_x, None, None, of_bias, None


@torch.no_grad()
def _product(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if weight.alone.is_nested and len(rows) <= MOST_TOKENS:
        out = torch.stack([best_rows(row[None].float().contiguous(), weight.alone, 0) for row in rows]).to(x.dtype)
        out = out if bias is None else out.add_(bias)
    elif len(rows) > MOST_TOKENS:
        out = _by_tiles(rows, weight, bias)
    elif rows.is_cpu and rows.dtype == torch.float32:
        out, _ = linears(rows.contiguous(), weight.alone)
        out = out if bias is None else out.add_(bias)
    else:
        out = linear(rows, weight.codes, weight.scales, bias)
    return out.view(*x.shape[:-1], len(weight))


def _by_tiles(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    out = x.new_empty(len(x), len(weight))
    step = max(1, TILE_BYTES[x.device.type] // (x.shape[1] * x.element_size()))
    scratch = x.new_empty(min(step, len(weight)), x.shape[1])
    for first in range(0, len(weight), step):
        at = slice(first, min(first + step, len(weight)))
        tile = scratch[:at.stop - first]
        dequantize_rows(weight.codes[at], weight.scales[at], tile)
        torch.mm(x, tile.T, out=out[:, at])
    return out if bias is None else out.add_(bias)


@torch.no_grad()
def _embedding(ids: Tensor, weight: Packed, *_, **__) -> Tensor:
    """ids [...] -> rows [..., K]. What further arguments say is for training."""
    at = ids.flatten()
    rows = torch.empty(len(at), weight.shape[1], dtype=weight.dtype, device=weight.device)
    dequantize_rows(weight.codes[at], weight.scales[at], rows)
    return rows.view(*ids.shape, -1)


_OWN = {F.linear: _linear, F.embedding: _embedding}
