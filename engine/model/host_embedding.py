"""The embedding of a model whose trunk is on a card, left in page-locked host memory: a token reads one row of it.

A row is a few kilobytes where the whole takes half a gigabyte of video memory and more; the kernel that fetches
experts reads it, so a recorded step does as well. A head that shares its weights needs them on the card, and then they
go there.
"""
from __future__ import annotations

import torch
from torch import nn

from engine.machine.pinned_memory import Driver, HostMemory
from engine.model.packed import Packed
from kernels.fill import fill
from kernels.trunk.linear import dequantize_rows

Tensor = torch.Tensor


class HostEmbedding(nn.Module):
    """Takes the place of an nn.Embedding. memory: close it when no kernel may read it any more."""

    def __init__(self, weight: Tensor, memory: HostMemory) -> None:
        """weight [V, H], packed or not, copied into `memory`, which has `host_bytes` of it."""
        super().__init__()
        self.memory, self.dtype, self.width = memory, weight.dtype, weight.shape[1]
        parts = _parts(weight)
        self._parts = [(part.dtype, part.shape[1:], part[0].nbytes) for part in parts]
        rows = memory.bytes.view(len(weight), _row_bytes(parts))
        self._far, at = rows[None], 0
        for part in parts:
            rows[:, at:at + part[0].nbytes] = part.contiguous().view(torch.uint8).flatten(1)
            at += part[0].nbytes

    def forward(self, ids: Tensor) -> Tensor:
        """ids int [.., T] on the device -> [.., T, H] there."""
        source = ids.flatten().int()
        near = torch.empty(len(source), self._far.shape[2], dtype=torch.uint8, device=ids.device)
        place = torch.arange(len(source), dtype=torch.int32, device=ids.device)
        fill(self._far, source, near, place, torch.zeros_like(place), torch.full_like(place, near.shape[1]))
        return self._values(near).view(*ids.shape, self.width)

    def _values(self, near: Tensor) -> Tensor:
        """Rows as they lie in `memory`, uint8 [T, P] -> [T, H]."""
        parts, at = [], 0
        for dtype, shape, n_bytes in self._parts:
            parts.append(near[:, at:at + n_bytes].contiguous().view(dtype).view(len(near), *shape))
            at += n_bytes
        if len(parts) == 1:
            return parts[0]
        out = torch.empty(len(near), self.width, dtype=self.dtype, device=near.device)
        dequantize_rows(*parts, out)
        return out


def host_bytes(weight: Tensor) -> int:
    return len(weight) * _row_bytes(_parts(weight))


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    weight = weight.detach()
    return (weight.codes, weight.scales) if isinstance(weight, Packed) else (weight,)


def _row_bytes(parts: tuple[Tensor, ...]) -> int:
    """A row's parts one behind the other; `fill` moves whole 16 bytes."""
    return -(-sum(part[0].nbytes for part in parts) // 16) * 16


def leave_on_host(model: nn.Module, driver: Driver) -> HostMemory | None:
    """Replace the model's embedding, if nothing else uses its weights and the system locks memory for it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or (head is not None and head.weight is embedding.weight):
        return None
    memory = HostMemory(host_bytes(embedding.weight), driver)
    if memory.reason:
        memory.close()
        return None
    model.set_input_embeddings(HostEmbedding(embedding.weight, memory))
    return memory
