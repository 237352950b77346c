"""Device version of kernels/fill.py: one warp copies a record or prefix, 16 bytes a lane; and the same for a launch
that has just decided what is missing (`copied`).

Few warps are enough: what counts is bytes in flight on the link (bandwidth times latency, 32 KiB on PCIe 4), and a
whole record of a warp is in flight at once. Far memory is page-locked host memory, read once, past the first cache
(Triton knows a modifier for more, `.cv`, and drops it silently).
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.planes import words_of
from kernels.gpu.turns import WORDS, leave, wait
from kernels.resolve import Link

Tensor = torch.Tensor

WARPS = 64              # copying at the same time
LARGEST_CHUNK = 2048    # words a warp has in flight: 64 registers of a lane
LANE_WORDS = 8          # of a lane in flight, where the blocks are larger
COPYING_WARPS = 128     # of all blocks of such a launch together: 128 KiB in flight


@triton.jit
def _fill(far, source, near, place, have, need, misses, n_entries, far_expert16, far_object16, near16,
          OBJECTS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LISTED: tl.constexpr):
    """far, near int32 pointers; strides in units of 16 bytes; CHUNKS chunks of CHUNK words cover an object."""
    n = tl.load(misses) if LISTED else n_entries
    for work in range(tl.program_id(0), n * CHUNKS, tl.num_programs(0)):
        entry = tl.load(misses + 1 + work // CHUNKS) if LISTED else work // CHUNKS
        to = tl.load(place + entry)
        low = tl.load(have + entry) // 16 * 4
        high = tl.where(to >= 0, tl.load(need + entry), 0) // 16 * 4
        index = tl.load(source + entry)
        start = (index // OBJECTS).to(tl.int64) * far_expert16 + (index % OBJECTS).to(tl.int64) * far_object16
        word = work % CHUNKS * CHUNK + tl.arange(0, CHUNK)
        wanted = (word >= low) & (word < high)
        words = tl.load(far + start * 4 + word, mask=wanted, cache_modifier=".cg")
        tl.store(near + to.to(tl.int64) * near16 * 4 + word, words, mask=wanted)


@triton.jit
def copied(turn, far, source, near, place, have, need, misses, first, far_expert16, far_object16, near16,
           OBJECTS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr):
    """The last thing of every block: of the misses that one of them publishes, a share, ENTRIES at a time, the blocks
    in turn from this one's `first` on."""
    wait(turn)
    n = tl.load(misses, cache_modifier=".cg")
    for work in range(first, tl.cdiv(n, ENTRIES) * CHUNKS, tl.num_programs(0)):
        at = work // CHUNKS * ENTRIES + tl.arange(0, ENTRIES)
        entry = tl.load(misses + 1 + at, mask=at < n, other=-1, cache_modifier=".cg")
        there = entry >= 0
        to = tl.load(place + entry, mask=there, other=0, cache_modifier=".cg")
        low = tl.load(have + entry, mask=there, other=0, cache_modifier=".cg") // 16 * 4
        high = tl.load(need + entry, mask=there, other=0, cache_modifier=".cg") // 16 * 4
        index = tl.load(source + entry, mask=there, other=0, cache_modifier=".cg")
        start = (index // OBJECTS).to(tl.int64) * far_expert16 + (index % OBJECTS).to(tl.int64) * far_object16
        word = (work % CHUNKS * CHUNK + tl.arange(0, CHUNK))[None]
        wanted = (word >= low[:, None]) & (word < high[:, None])
        words = tl.load(far + (start * 4)[:, None] + word, mask=wanted, cache_modifier=".cg")
        tl.store(near + (to.to(tl.int64) * near16 * 4)[:, None] + word, words, mask=wanted)
    leave(turn)


def copying(link: Link | None, none: Tensor, warps: int) -> tuple[tuple, dict[str, int]]:
    """Tables and numbers, then constants, of `copied` in a launch of so many warps a block; without a link nothing is
    copied."""
    if link is None:
        return (none, none, none, 0, 0, 0), {"OBJECTS": 1, "CHUNKS": 1, "CHUNK": 4, "ENTRIES": 1, "COPIES": False}
    far, near, turn = link
    assert far.dim() == 3 and near.dim() == 2 and far.shape[2] <= near.shape[1], (far.shape, near.shape)
    assert turn.dtype == torch.int32 and turn.numel() == WORDS and turn.is_contiguous(), turn
    far_words, near_words, lanes = words_of(far), words_of(near), 32 * warps
    chunk = min(triton.next_power_of_2(far_words.shape[2]), LANE_WORDS * lanes)
    return ((far_words, near_words, turn, far.stride(0) // 16, far.stride(1) // 16, near.stride(0) // 16),
            {"OBJECTS": far.shape[1], "CHUNKS": triton.cdiv(far_words.shape[2], chunk), "CHUNK": chunk,
             "ENTRIES": max(1, LANE_WORDS * lanes // chunk), "COPIES": True})


def fill(far: Tensor, source: Tensor, near: Tensor, place: Tensor, have: Tensor, need: Tensor,
         misses: Tensor | None = None) -> None:
    """As kernels.fill.fill; have and need are multiples of 16."""
    assert far.dim() == 3 and near.dim() == 2 and far.shape[2] <= near.shape[1], (far.shape, near.shape)
    for table in (source, place, have, need):
        assert table.dtype == torch.int32 and table.is_contiguous() and table.numel() == source.numel()
    far_words, near_words = words_of(far), words_of(near)
    chunk = min(triton.next_power_of_2(far_words.shape[2]), LARGEST_CHUNK)
    chunks = triton.cdiv(far_words.shape[2], chunk)
    n = source.numel()
    _fill[(min(WARPS, max(n, 1) * chunks),)](
        far_words, source, near_words, place, have, need, source if misses is None else misses, n,
        far.stride(0) // 16, far.stride(1) // 16, near.stride(0) // 16,
        OBJECTS=far.shape[1], CHUNKS=chunks, CHUNK=chunk, LISTED=misses is not None, num_warps=1)
