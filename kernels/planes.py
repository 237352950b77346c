"""Codes to words and back: with kernels/layout.py the only place where a bit position is written.

Legend: R rows (neurons), H hidden padded to a multiple of 256, G groups along H, P bytes of a row.
A 4-bit code is `4*coarse + refine`; the sketch holds the coarse half, the record the refinement. Each view has its own
scale and offset per group: value = scale * code + offset, float16 in the file, float32 when computed.
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.layout import Layout

Tensor = torch.Tensor


class Nested(NamedTuple):
    """One matrix as nested codes. `coarse` is the (scale, offset) of the 2-bit view, `fine` of the 4-bit view."""

    codes: Tensor   # uint8 [R, H], 0..15
    coarse: Tensor  # float16 [R, G, 2]
    fine: Tensor    # float16 [R, G, 2]


def pack2(codes: Tensor) -> Tensor:
    """uint8 [..., H] codes 0..3 -> uint8 [..., H/4]: int32 words of 16 codes, as bytes."""
    c = codes.unflatten(-1, (-1, 4, 4))                       # [..., words, s, b]
    return (c[..., 0, :] | c[..., 1, :] << 2 | c[..., 2, :] << 4 | c[..., 3, :] << 6).flatten(-2)


def unpack2(plane: Tensor) -> Tensor:
    """uint8 [..., H/4] -> uint8 [..., H] codes 0..3."""
    b = plane.unflatten(-1, (-1, 4))                          # [..., words, b]
    return torch.stack((b & 3, b >> 2 & 3, b >> 4 & 3, b >> 6), dim=-2).flatten(-3)


def pack4(codes: Tensor) -> Tensor:
    """uint8 [..., H] codes 0..15 -> uint8 [..., H/2]: int32 words of 8 codes, as bytes."""
    c = codes.unflatten(-1, (-1, 2, 4))
    return (c[..., 0, :] | c[..., 1, :] << 4).flatten(-2)


def unpack4(plane: Tensor) -> Tensor:
    """uint8 [..., H/2] -> uint8 [..., H] codes 0..15."""
    b = plane.unflatten(-1, (-1, 4))
    return torch.stack((b & 15, b >> 4), dim=-2).flatten(-3)


def _bytes(scales: Tensor) -> Tensor:
    """float16 [R, G, 2] -> uint8 [R, 4G]."""
    return scales.to(torch.float16).contiguous().view(torch.uint8).flatten(1)


def _scales(rows: Tensor, at: int, layout: Layout) -> Tensor:
    """uint8 [R, P] -> float32 [R, G, 2]."""
    part = rows[:, at:at + layout.scales].contiguous()
    return part.view(torch.float16).unflatten(1, (layout.groups, 2)).float()


def _values(codes: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """uint8 [R, H], float32 [R, G, 2] -> float32 [R, H]."""
    grouped = codes.unflatten(1, (layout.groups, layout.group)).float()
    return torch.addcmul(scales[..., 1:], grouped, scales[..., :1]).flatten(1)


def sketch_rows(gate: Nested, up: Nested, layout: Layout) -> Tensor:
    """-> uint8 [R, layout.sketch_row]."""
    parts = [pack2(gate.codes >> 2), pack2(up.codes >> 2), _bytes(gate.coarse), _bytes(up.coarse)]
    return _row(parts, layout.sketch_row)


def record_rows(gate: Nested, up: Nested, down: Nested, layout: Layout) -> Tensor:
    """-> uint8 [R, layout.record]."""
    head = _row([pack4(down.codes), _bytes(down.fine), _bytes(gate.fine), _bytes(up.fine)], layout.refine_at)
    return _row([head, pack2(gate.codes & 3), pack2(up.codes & 3)], layout.record)


def _row(parts: list[Tensor], n_bytes: int) -> Tensor:
    row = torch.cat(parts, dim=1)
    return torch.nn.functional.pad(row, (0, n_bytes - row.shape[1]))


def decode_sketch(rows: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """uint8 [R, >= sketch_row] -> gate, up float32 [R, H]: the 2-bit view."""
    p, at = layout.plane2, layout.sketch_scales_at
    gate = _values(unpack2(rows[:, :p]), _scales(rows, at, layout), layout)
    up = _values(unpack2(rows[:, p:2 * p]), _scales(rows, at + layout.scales, layout), layout)
    return gate, up


def decode_down(records: Tensor, layout: Layout) -> Tensor:
    """uint8 [R, >= prefix] -> down float32 [R, H]."""
    return _values(unpack4(records[:, :layout.plane4]), _scales(records, layout.record_scales_at, layout), layout)


def decode_gate(sketch: Tensor, records: Tensor, layout: Layout) -> Tensor:
    """Sketch rows and records of the same neurons -> gate float32 [R, H]: the 4-bit view."""
    return _refined(sketch, records, layout, 0)


def decode_up(sketch: Tensor, records: Tensor, layout: Layout) -> Tensor:
    """Sketch rows and records of the same neurons -> up float32 [R, H]: the 4-bit view."""
    return _refined(sketch, records, layout, 1)


def codes_of(sketch: Tensor, records: Tensor, fine: tuple[Tensor, Tensor], layout: Layout,
             ) -> tuple[tuple[Tensor, Tensor], ...]:
    """Sketch rows and records of the same neurons -> of gate, up and down the codes int32 [R, G, group] and their pairs
    float32 [R, G, 2]; of gate and of up at 4 bits where `fine`, bool [R] each, else those of the sketch."""
    found, p = [], layout.plane2
    for i, wanted in enumerate(fine):
        coarse, at = unpack2(sketch[:, i * p:(i + 1) * p]), layout.refine_at + i * p
        codes = torch.where(wanted[:, None], coarse << 2 | unpack2(records[:, at:at + p]), coarse)
        pairs = torch.where(wanted[:, None, None],
                            _scales(records, layout.record_scales_at + (1 + i) * layout.scales, layout),
                            _scales(sketch, layout.sketch_scales_at + i * layout.scales, layout))
        found.append((codes, pairs))
    found.append((unpack4(records[:, :layout.plane4]), _scales(records, layout.record_scales_at, layout)))
    return tuple((codes.int().unflatten(1, (layout.groups, layout.group)), pairs) for codes, pairs in found)


def _refined(sketch: Tensor, records: Tensor, layout: Layout, which: int) -> Tensor:
    p = layout.plane2
    at = layout.refine_at + which * p
    codes = unpack2(sketch[:, which * p:(which + 1) * p]) << 2 | unpack2(records[:, at:at + p])
    return _values(codes, _scales(records, layout.record_scales_at + (1 + which) * layout.scales, layout), layout)
