"""The embedding of a model whose trunk is on a card, left in page-locked host memory: a token reads one row of it.

A row is a few kilobytes where the whole takes about a gigabyte of video memory; the kernel that fetches experts reads
it, so a recorded step does as well. A head that shares its weights needs them on the card, and then they go there.
"""
from __future__ import annotations

import torch
from torch import nn

from engine.machine.pinned_memory import Driver, HostMemory
from kernels.fill import fill

Tensor = torch.Tensor


class HostEmbedding(nn.Module):
    """Takes the place of an nn.Embedding. memory: close it when no kernel may read it any more."""

    def __init__(self, weight: Tensor, memory: HostMemory) -> None:
        """weight [V, H], copied into `memory`, which is as large."""
        super().__init__()
        self.memory, self.dtype = memory, weight.dtype
        rows = memory.bytes.view(len(weight), -1)
        rows.copy_(weight.detach().contiguous().view(torch.uint8))
        self._far = rows[None]

    def forward(self, ids: Tensor) -> Tensor:
        """ids int [.., T] on the device -> [.., T, H] there."""
        source = ids.flatten().int()
        near = torch.empty(len(source), self._far.shape[2], dtype=torch.uint8, device=ids.device)
        place = torch.arange(len(source), dtype=torch.int32, device=ids.device)
        fill(self._far, source, near, place, torch.zeros_like(place), torch.full_like(place, near.shape[1]))
        return near.view(self.dtype).view(*ids.shape, -1)


def leave_on_host(model: nn.Module, driver: Driver) -> HostMemory | None:
    """Replace the model's embedding, if nothing else uses its weights and the system locks memory for it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or (head is not None and head.weight is embedding.weight):
        return None
    memory = HostMemory(embedding.weight.nbytes, driver)
    if memory.reason:
        memory.close()
        return None
    model.set_input_embeddings(HostEmbedding(embedding.weight, memory))
    return memory
