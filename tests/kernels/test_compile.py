"""The machine code of every device kernel for every card, compiled without one: spills nowhere but where
`SPILLED` says, wide loads, little work.

The launches are caught from the real wrappers with the shapes of real models, so what is compiled is what would run.
"""
from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which this platform's package index may not have")

from kernels.activation import FixedPoint, Gate, NeuronBias
from kernels.gpu import activation as gpu_activation
from kernels.gpu import apply as gpu_apply
from kernels.gpu import evict as gpu_evict
from kernels.gpu import fetch as gpu_fetch
from kernels.gpu import fill as gpu_fill
from kernels.gpu import grouped as gpu_grouped
from kernels.gpu import linear as gpu_linear
from kernels.gpu import pool as gpu_pool
from kernels.gpu import score as gpu_score
from kernels.gpu import select as gpu_select
from kernels.gpu import turns as gpu_turns
from kernels.gpu import whole_sums as gpu_whole_sums
from kernels.gpu.trunk import attend as gpu_attend
from kernels.gpu.trunk import choose as gpu_choose
from kernels.gpu.trunk import delta as gpu_delta
from kernels.gpu.trunk import head as gpu_head
from kernels.gpu.trunk import latent as gpu_latent
from kernels.gpu.trunk import settle as gpu_settle
from kernels.layout import Layout, default_group_size
from kernels.pool import new_pool
from kernels.resolve import Link
from kernels.trunk.attend import Heads
from kernels.trunk.choose import Entrance, Reader
from kernels.trunk.head import split
from kernels.trunk.linear import Matrices
from kernels.trunk.route import Choice
from kernels.weigh import Mixture
from tests.support import aot
from tests.support.random_experts import random_latent, random_mixer, random_settling, random_step

QUICK_CARD, QUICK_HIDDEN = 86, 2048
# At most, of the kernels of every layer; what the compiler takes decides how many blocks a multiprocessor holds, and
# another version may take twice as many (`_score` with four warps: 128 with Triton 3.7.1, 227 with 3.6.0).
REGISTERS = {"_quantize": 40, "_score": 96, "_products": 128, "_down": 80, "_select": 128, "_take": 80,
             "_look_ahead": 128, "_choose_neurons": 128, "_grouped_gate_up": 192, "_grouped_down": 128}


def cards() -> list:
    return [card if card == QUICK_CARD else pytest.param(card, marks=pytest.mark.slow) for card in aot.CAPABILITIES]


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def bytes_(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


def layout_of(hidden: int) -> Layout:
    return Layout(hidden, 512, default_group_size(hidden))


def score_call(hidden: int, biased: bool = False) -> Callable:
    layout, k = layout_of(hidden), 8
    bias = bias_of(1, k) if biased else None
    return lambda: gpu_score.score(torch.zeros(1, layout.padded, dtype=torch.int8), torch.zeros(1, layout.groups),
                                      bytes_(9, layout.sketch_bytes), integers(1, k), torch.zeros(1, k), layout,
                                      Gate("clamped_swiglu" if biased else "silu"), bias,
                                      histogram=integers(1, 4096))


def score_up_call(hidden: int) -> Callable:
    layout = layout_of(hidden)
    return lambda: gpu_score.score_up(torch.zeros(1, layout.padded, dtype=torch.int8), torch.zeros(1, layout.groups),
                                         bytes_(9, layout.sketch_bytes), integers(1, 8), layout)


def bias_of(*picks: int, neurons: int = 512) -> NeuronBias:
    """As a step gives it: ids are the router's int64."""
    return NeuronBias(*torch.zeros(2, 32, neurons), integers(*picks).long())


def mixture_of(k: int, hidden: int, biased: bool) -> Mixture:
    bias = (torch.zeros(32, hidden), integers(1, k).long()) if biased else ()
    return Mixture(torch.zeros(1, k), hidden, torch.zeros(1, hidden), *bias)


def apply_call(hidden: int, n: int = 1229, biased: bool = False) -> Callable:
    layout, k = layout_of(hidden), 4
    bias = bias_of(1, k) if biased else None
    return lambda: gpu_apply.apply(torch.zeros(1, hidden), bytes_(9, layout.sketch_bytes), integers(1, k),
                                      bytes_(9, layout.record), integers(1, n), integers(1, n),
                                      integers(1, n).to(torch.int8), layout,
                                      Gate("clamped_swiglu" if biased else "silu"), bias,
                                      mixture_of(k, hidden, biased))


def dense_call(hidden: int, biased: bool = False) -> Callable:
    layout, k = layout_of(hidden), 8
    bias = bias_of(1, k) if biased else None
    return lambda: gpu_apply.dense(torch.zeros(1, hidden), bytes_(2, layout.blob_bytes), integers(1, k),
                                      layout, Gate("clamped_swiglu" if biased else "gelu_tanh"),
                                      bias, mixture_of(k, hidden, biased))


def whole_sums_call(hidden: int, biased: bool = False, n: int = 0) -> Callable:
    """n: of chosen neurons alone."""
    layout, k = layout_of(hidden), 8
    bias = bias_of(1, k) if biased else None
    codes, scale = torch.zeros(1, layout.padded, dtype=torch.int8), torch.zeros(1, layout.groups)
    fixed, rest = FixedPoint(codes, codes, scale, scale), (layout, Gate("clamped_swiglu" if biased else "silu"), bias)
    if n:
        chosen = bytes_(n, layout.record), integers(1, n), integers(1, n), torch.zeros(1, n, dtype=torch.int8)
        return lambda: gpu_whole_sums.chosen_sums(fixed, bytes_(2, layout.sketch_bytes), integers(1, k), *chosen, *rest)
    return lambda: gpu_whole_sums.whole_sums(fixed, bytes_(2, layout.blob_bytes), integers(1, k), *rest)


def dequantize_call(hidden: int, dtype: torch.dtype) -> Callable:
    layout = layout_of(hidden)
    return lambda: gpu_grouped.dequantize(bytes_(1, layout.blob_bytes), torch.zeros(1, 1024, hidden, dtype=dtype),
                                                torch.zeros(1, 512, hidden, dtype=dtype), layout)


def grouped_call(hidden: int, neurons: int, kind: str = "silu", biased: bool = False, n: int = 4,
                 dtype: torch.dtype = torch.bfloat16) -> Callable:
    layout = Layout(hidden, neurons, default_group_size(hidden))
    bias = bias_of(n, neurons=neurons) if biased else None
    return lambda: gpu_grouped.multiply_tile(torch.zeros(40, hidden, dtype=dtype), torch.zeros(300, dtype=torch.int64),
                                          integers(n), bytes_(n, layout.blob_bytes), layout, Gate(kind), bias)


def matrix(rows: int, columns: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """codes, scales of a trunk matrix."""
    codes = bytes_(rows, columns // 2) if bits == 4 else bytes_(rows, columns).view(torch.int8)
    return codes, torch.zeros(rows, columns // 64, *((2,) if bits == 4 else ()), dtype=torch.float16)


def linear_call(rows: int, columns: int, bits: int, dtype: torch.dtype = torch.bfloat16, biased: bool = False,
                ) -> Callable:
    bias = torch.zeros(rows, dtype=dtype) if biased else None
    return lambda: gpu_linear.linear(torch.zeros(1, columns, dtype=dtype), *matrix(rows, columns, bits), bias)


def linears_call(columns: int, kinds: tuple, normed: bool) -> Callable:
    """kinds: (rows, bits) of each matrix; 16 bits are no codes. Normed, or added to what was there."""
    parts = tuple((*(matrix(rows, columns, bits) if bits < 16 else (torch.zeros(rows, columns).bfloat16(), None)), None)
                  for rows, bits in kinds)
    x, n_rows = torch.zeros(4, columns), sum(rows for rows, _ in kinds)
    rest = (torch.zeros(columns).bfloat16(), 1e-6) if normed else (None, 0.0, torch.zeros(4, n_rows))
    return lambda: gpu_linear.linears(x, Matrices(parts), *rest)


def gated_call(size: int, rows: int, bits: int, has_logit: bool, kind: str = "silu") -> Callable:
    back = Matrices(((*matrix(rows, size, bits), None),))
    return lambda: gpu_linear.gated_linears(torch.zeros(4, 2 * size + has_logit), back, torch.zeros(4, rows), kind)


def choose_call(hidden: int, n_experts: int, choice: Choice, more: tuple = (), beside: tuple = ()) -> Callable:
    """more, beside: (rows, bits) of what is read behind the router's norm, and behind another one."""
    def reader(*kinds: tuple[int, int]) -> Reader:
        parts = (matrix(rows, hidden, bits) if bits < 16 else (torch.zeros(rows, hidden).bfloat16(), None)
                 for rows, bits in kinds)
        return Reader(Matrices(tuple((*part, None) for part in parts)), torch.zeros(hidden).bfloat16(), 1e-6)
    entrance = Entrance(reader((n_experts, 16), *more), n_experts, choice, reader(*beside) if beside else None)
    x, given = torch.zeros(4, hidden), (torch.zeros(4, hidden),) if beside else ()
    return lambda: gpu_choose.choose(x, entrance, layout_of(hidden), *given)


def head_call(columns: int, n_best: int) -> Callable:
    """Of rows enough for the largest blocks."""
    codes, scales = matrix(4096, columns, 8)
    head = Matrices(((split(codes), scales, None),))
    return lambda: gpu_head.best_rows(torch.zeros(1, columns), head, n_best, torch.zeros(columns).bfloat16(), 1e-6)


def attend_call(queries: int, cached: int, size: int, n_tokens: int, norm: int = 0, turned: int | None = None,
                **rest) -> Callable:
    """norm: numbers of a head's, or of all heads at once. turned: of a head, where it is a part; then it is gated."""
    norms = (torch.zeros(norm), torch.zeros(norm if norm == size else cached * size)) if norm else (None, None)
    heads = Heads(queries, cached, size, size ** -0.5, *norms, 1e-6, turned is not None, **rest)
    rows = torch.zeros(2, 1, cached, 65, size, dtype=torch.bfloat16)
    at = torch.zeros(n_tokens, dtype=torch.int64)
    return lambda: gpu_attend.attend(torch.zeros(n_tokens, heads.width),
                                     torch.zeros(2, n_tokens, turned or size), *rows, at[0], heads, at)


def held_call(queries: int, cached: int, size: int, n_tokens: int, **rest) -> Callable:
    heads = Heads(queries, cached, size, size ** -0.5, held=True, **rest)
    rows, at = torch.zeros(2, 1, cached, 65, size).bfloat16(), torch.zeros(n_tokens, dtype=torch.int64)
    return lambda: gpu_attend.attend(torch.zeros(n_tokens, heads.width).bfloat16(), torch.zeros(2, n_tokens, 0), *rows,
                                     at[0], heads, at)


def delta_call(key_heads: int, per: int, size: int, by_head: bool, n_tokens: int) -> Callable:
    mixer = random_mixer(key_heads, per, size, size, by_head)
    projected, *states = random_step(mixer, n_tokens, 2, torch.bfloat16)
    return lambda: gpu_delta.delta(projected, *states, mixer, torch.zeros(1, dtype=torch.int64))


def latent_call(heads: int, still: int, values: int, bits: int, n_tokens: int, neighbours: bool = True,
                cached: bool = False) -> Callable:
    """Rows of 512 numbers, 64 of which turn beside them, as all that have them."""
    latent = random_latent(heads, 512, still, 64, values, bits, neighbours, cached)
    cache, at = [torch.zeros(1, 1, 65, n, dtype=torch.bfloat16) for n in (512, 64)], torch.zeros(4, dtype=torch.int64)
    return lambda: gpu_latent.attend_latent(torch.zeros(n_tokens, heads * (still + 64)), torch.zeros(n_tokens, 576),
                                            torch.zeros(2, n_tokens, 64), *cache, at[0], latent, at[:n_tokens])


def dequantize_rows_call(bits: int) -> Callable:
    return lambda: gpu_linear.dequantize_rows(*matrix(64, 2048, bits), torch.zeros(64, 2048, dtype=torch.bfloat16))


def select_call(n: int, counted: bool) -> Callable:
    return lambda: gpu_select.select(torch.zeros(1, n), integers(1), integers(1), n // 2,
                                        integers(1, 4096) if counted else None)


def take_call(n: int, ahead: bool, rows: int = 1) -> Callable:
    return lambda: gpu_pool.take(new_pool(5000, 999), integers(rows, n), integers(rows, n), integers(1), ahead,
                                    integers(rows * n + 1))


def link_of(experts: int, objects: int, n_bytes: int) -> Link:
    return Link(bytes_(experts, objects, n_bytes), bytes_(9, n_bytes), integers(gpu_turns.WORDS))


def resolve_call(ahead: bool, linked: bool = False) -> Callable:
    rest = (integers(1), integers(5).long(), torch.zeros((), dtype=torch.bool))
    return lambda: gpu_pool.resolve_experts(new_pool(5000, 999), integers(1, 8).long(), 256, 589_824, *rest,
                                               integers(1) if ahead else None,
                                               link_of(3, 1, 589_824) if linked else None)


def resolve_neurons_call(n: int, linked: bool = False) -> Callable:
    rest = (integers(1), integers(5).long(), torch.zeros((), dtype=torch.bool))
    return lambda: gpu_pool.resolve_neurons(new_pool(5000, 999), integers(1, n), integers(1, n).to(torch.int8),
                                               integers(1, 8).long(), 131_072, layout_of(2048), *rest,
                                               link_of(3, 512, layout_of(2048).record) if linked else None)


def look_ahead_call(experts: int, hidden: int, top_k: int) -> Callable:
    rest = (integers(1), integers(5).long(), torch.zeros((), dtype=torch.bool), integers(1))
    return lambda: gpu_fetch.look_ahead(torch.zeros(1, hidden), torch.zeros(experts, hidden), top_k,
                                            new_pool(5000, 999), 256, 589_824, *rest, link_of(3, 1, 589_824))


def choose_neurons_call(n: int, kept: int, routed: int = 8) -> Callable:
    layout, rest = layout_of(2048), (integers(1), integers(5).long(), torch.zeros((), dtype=torch.bool))
    return lambda: gpu_fetch.choose_neurons(torch.zeros(1, n), integers(1), integers(1), kept, integers(3, 4096),
                                                integers(1, routed).long(), new_pool(5000, 999), 131_072, layout, *rest,
                                                link_of(3, 512, layout.record))


def fill_call(n_bytes: int, listed: bool) -> Callable:
    return lambda: gpu_fill.fill(bytes_(3, 512, n_bytes), integers(99), bytes_(9, n_bytes), integers(99),
                                    integers(99), integers(99), integers(100) if listed else None)


LINEAR_SHAPES = [(8192, 2048), (512, 2048), (2048, 512), (256, 2880), (4096, 2816), (4096, 4096), (1024, 5120),
                 (151_936, 2048)]
CALLS = {
    "quantize": lambda: gpu_activation.quantize_activation(torch.zeros(1, 2048), 128),
    "quantize for both": lambda: gpu_activation.quantize(torch.zeros(1, 2048), 128),
    "quantize padded": lambda: gpu_activation.quantize(torch.zeros(1, 2880), 64, 3072),
    "score biased": score_call(2880, biased=True),
    "score up": score_up_call(2048),
    "select 4096": select_call(4096, True),
    "select 6144": select_call(6144, True),
    "select 8192": select_call(8192, True),
    "select 28672": select_call(28_672, True),
    "select uncounted": select_call(28_672, False),
    "select uncounted 8192": select_call(8192, False),
    "select above": lambda: gpu_select.select_above(torch.zeros(1, 9000), torch.zeros(1, 9000), 4096),
    "take": take_call(1229, False),
    "take four tokens": take_call(1229, False, rows=4),
    "take ahead": take_call(8, True),
    "resolve experts": resolve_call(False),
    "resolve ahead": resolve_call(True),
    "resolve neurons": resolve_neurons_call(1229),
    "bring experts": resolve_call(False, linked=True),
    "bring ahead": resolve_call(True, linked=True),
    "choose neurons 4096": choose_neurons_call(4096, 1229),
    "choose neurons 6144": choose_neurons_call(6144, 1843),
    "choose neurons 8192": choose_neurons_call(8192, 4000),
    "choose neurons 11520": choose_neurons_call(11_520, 3456, 4),
    "look ahead": look_ahead_call(256, 2048, 8),
    "look ahead 2880": look_ahead_call(32, 2880, 4),
    "look ahead 512": look_ahead_call(512, 2048, 10),
    "bring neurons": resolve_neurons_call(1229, linked=True),
    "fill records": fill_call(2304, True),
    "fill sketches": fill_call(589_824, False),
    "age": lambda: gpu_evict.age(new_pool(5000, 4999), integers(1), integers(1)),
    "apply": apply_call(2048),
    "apply biased": apply_call(2880, biased=True),
    "apply 4096": apply_call(4096, n=4300),
    "apply 5120": apply_call(5120),
    "dense": dense_call(2048),
    "whole sums": whole_sums_call(2048),
    "whole sums biased": whole_sums_call(2048, biased=True),     # gpt-oss' 2880 compile for two minutes each
    "chosen sums": whole_sums_call(2048, n=1229),
    "chosen sums biased": whole_sums_call(2048, biased=True, n=1229),
    "dense biased": dense_call(2880, biased=True),
    "dequantize": dequantize_call(2048, torch.bfloat16),
    "dequantize 2880": dequantize_call(2880, torch.float16),
    # The catalogue's trunks: queries, keys, the delta-net's and the shared expert's, the head; R, K.
    **{f"linear {bits} bits {rows} x {columns}": linear_call(rows, columns, bits)
       for bits in (8, 4) for rows, columns in LINEAR_SHAPES},
    "linear biased": linear_call(4096, 2880, 4, torch.float16, biased=True),
    "linear biased, split": linear_call(64, 2880, 8, torch.float16, biased=True),
    # Qwen3's and Mixtral's: queries, keys and values behind a norm; routers; what is added to the residual.
    "linears 4 bits": linears_call(2048, ((4096, 4), (512, 4), (512, 4)), True),
    "linears 8 bits": linears_call(4096, ((4096, 8), (1024, 8), (1024, 8)), True),
    "linears router": linears_call(2048, ((128, 16),), True),
    "head": head_call(2048, 20),
    "head, all rows": head_call(2880, 0),
    "linears added": linears_call(4096, ((2048, 4),), False),
    "linears of two kinds": linears_call(2048, ((8192, 4), (4096, 4), (32, 8), (32, 8)), True),  # Qwen3.6's delta-nets
    "attend": attend_call(32, 4, 128, 4, 128),           # Qwen3 30B
    "attend one": attend_call(32, 8, 128, 1),             # Mixtral
    "attend norm of all": attend_call(16, 16, 128, 4, 2048),  # OLMoE
    "attend gated": attend_call(16, 2, 256, 1, 256, 64),  # Qwen3.6 35B and Qwen3 Next 80B
    "attend gated, four tokens": attend_call(16, 2, 256, 4, 256, 64),
    "attend in a window": attend_call(64, 8, 64, 4, window=128, sinks=torch.zeros(64)),     # gpt-oss
    "attend in a window, 256": attend_call(16, 8, 256, 4, 256, window=1024, value_norm=torch.zeros(256)),   # Gemma 4
    "attend in one": attend_call(16, 2, 512, 4, 512, value_norm=torch.zeros(512), in_one=True),
    "attend held": held_call(64, 8, 128, 1, window=512),  # Laguna
    "attend held, four tokens": held_call(32, 4, 128, 4, window=128, sinks=torch.zeros(32).bfloat16()),   # Flint
    "latent": latent_call(20, 192, 256, 4, 1),            # GLM-4.7-Flash
    "latent, four tokens": latent_call(16, 128, 128, 8, 4, cached=True),    # DeepSeek-V2-Lite
    "latent, many heads": latent_call(128, 128, 128, 4, 4),   # DeepSeek-V3
    "choose": choose_call(2048, 128, Choice(8, True)),    # Qwen3 30B
    "choose, shared": choose_call(2048, 256, Choice(8, True), ((1, 16), (512, 4), (512, 4))),   # Qwen3.6 35B
    "choose, padded": choose_call(2880, 32, Choice(4, True)),   # gpt-oss
    "choose of groups": choose_call(2048, 256, Choice(8, True, True, torch.zeros(256), 8, 4), ((2048, 8), (2048, 8))),
    "choose, beside": choose_call(2816, 128, Choice(8, True, factors=torch.zeros(128)), (), ((2112, 4), (2112, 4))),
    "delta": delta_call(16, 2, 128, False, 1),            # Qwen3.6 35B
    "delta by head": delta_call(16, 2, 128, True, 4),     # Qwen3 Next 80B
    # Shared experts' ways back behind their gates: Qwen3.6's, with a logit; GLM-4.7-Flash's; Gemma 4's.
    "gated": gated_call(512, 2048, 4, True),
    "gated, no logit": gated_call(1536, 2048, 8, False),
    "gated of another kind": gated_call(2112, 2816, 4, False, "gelu_tanh"),
    "settle": lambda: gpu_settle.settle(*random_settling(4, 2816, True, True)),     # Gemma 4
    "settled linears": lambda: gpu_settle.settled_linears(      # Gemma 4
        torch.zeros(4, 4096), Matrices(((*matrix(2816, 4096, 4), None),)), *random_settling(4, 2816, False, True)[::2]),
    "settle one": lambda: gpu_settle.settle(*random_settling(1, 2816, False, True)),
    "rows 8 bits": dequantize_rows_call(8),
    "rows 4 bits": dequantize_rows_call(4),
}


SLOW_CALLS = {"select 8192", "select uncounted", "select uncounted 8192", "head, all rows", "score biased", "score up",
              "take four tokens", "take ahead", "bring ahead", "look ahead 2880", "choose neurons 8192",
              "resolve ahead", "apply biased", "apply 4096", "apply 5120", "dense", "dense biased", "dequantize 2880",
              "whole sums biased", "chosen sums biased", "linear biased", "linear biased, split", "rows 8 bits",
              "linears 8 bits",
              "attend one", "attend norm of all", "delta by head",
              "attend gated, four tokens", "attend in a window, 256", "attend in one", "attend held, four tokens",
              "gated of another kind", "choose of groups", "choose, padded",
              "latent, four tokens", "latent, many heads",
              *(f"linear {bits} bits {rows} x {columns}" for bits in (8, 4) for rows, columns in LINEAR_SHAPES[2:])}


# The catalogue's experts as prefill multiplies them: Qwen3.6's and Qwen3 30B's, Gemma 4's, gpt-oss's, Mixtral's, wide.
GROUPED = {"2048": grouped_call(2048, 512, n=37), "2048, 768": grouped_call(2048, 768, n=25),
           "2816": grouped_call(2816, 704, "gelu_tanh"), "2880": grouped_call(2880, 2880, "clamped_swiglu", True),
           "4096": grouped_call(4096, 14_336, n=1), "5120": grouped_call(5120, 1536),
           "16 bits": grouped_call(2048, 512, dtype=torch.float16)}


MATRIX_UNITS = r"\bHG?MMA"


@pytest.mark.parametrize("card", cards()[1:])       # not that of 7.5
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "2048" else pytest.mark.slow)
                                  for name in GROUPED])
def test_the_packed_product_uses_matrix_units(monkeypatch, name, card):
    """With 16-bit sums, without spills, in a third of a multiprocessor's shared memory at most."""
    launches = aot.recorded(GROUPED[name], monkeypatch)
    assert [launch.kernel.__name__ for launch in launches] == ["_halve", "_grouped_gate_up", "_grouped_down"]
    for launch in launches:
        machine = aot.compiled(launch, card)
        assert not machine.count(r"\b(STL|LDL)\b"), (launch.kernel.__name__, machine.registers)
        taken = launch.kernel.__name__, machine.registers
        assert machine.registers <= REGISTERS.get(launch.kernel.__name__, 128), taken
        assert 3 * machine.shared <= aot.SHARED_LIMIT[card] and not machine.count(r"\bI2F")
        products, in_16_bits = machine.count(MATRIX_UNITS), machine.count(MATRIX_UNITS + r"\S*\.F16")
        assert products == in_16_bits and bool(products) == (launch.kernel.__name__ != "_halve")


def test_older_cards_have_no_matrix_units_in_triton(monkeypatch):
    """Once they have, tiles need not be decoded for them any more (engine/planning/sizes.py, PACKED_FROM)."""
    _, launch, _ = aot.recorded(grouped_call(256, 64, n=1), monkeypatch)
    assert not aot.compiled(launch, 75).count(MATRIX_UNITS) and aot.compiled(launch, 80).count(MATRIX_UNITS)


# Heads of 512 numbers on a card whose matrix products are made of additions (Triton 3.7), and 16 warps that choose,
# look up and copy, with 128 registers each, on one of capability 9.0: loads and stores, at most.
SPILLED = {("attend in one", 75): 40, **{(f"choose neurons {n}", 90): 8 for n in (6144, 8192, 11_520)}}


@pytest.mark.parametrize("card", cards())
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_CALLS else ())
                                  for name in CALLS])
def test_nothing_spills_and_shared_memory_fits(monkeypatch, name, card):
    launches = aot.recorded(CALLS[name], monkeypatch)
    assert launches
    for launch in launches:
        machine = aot.compiled(launch, card)
        assert machine.instructions, launch.kernel.__name__
        spilled = machine.count(r"\b(STL|LDL)\b")
        assert spilled <= SPILLED.get((name, card), 0), (launch.kernel.__name__, machine.registers, spilled)
        assert machine.shared <= aot.SHARED_LIMIT[card], launch.kernel.__name__
        taken = launch.kernel.__name__, machine.registers
        assert machine.registers <= REGISTERS.get(launch.kernel.__name__, 255), taken


@pytest.mark.parametrize("card", cards())
@pytest.mark.parametrize("hidden", [pytest.param(h, marks=() if h == QUICK_HIDDEN else pytest.mark.slow)
                                    for h in (2048, 2816, 2880, 4096, 5120)])
def test_score_takes_few_instructions_a_code(monkeypatch, hidden, card):
    launch, = aot.recorded(score_call(hidden), monkeypatch)
    machine = aot.compiled(launch, card)
    # No loop is left in the kernel, so a lane executes every instruction at most once: all of its codes, start and end.
    codes_of_a_lane = gpu_score.ROWS * layout_of(hidden).padded * 2 / (32 * machine.n_warps)
    # With eight warps a lane has half the codes, so that start and end weigh more: most where a row has eleven groups.
    assert len(machine.instructions) / codes_of_a_lane <= (1.8 if hidden == 2816 else 1.6)
    assert machine.count(r"\bIDP") >= codes_of_a_lane / 4
    assert not machine.count(r"\b(STL|LDL)\b")
    assert machine.count(r"\bLDG\.E\S*\.128") >= codes_of_a_lane / 64


@pytest.mark.parametrize("card", cards())
@pytest.mark.parametrize("name", ["fill records", "fill sketches"])
def test_fill_moves_16_bytes_a_lane(monkeypatch, name, card):
    launch, = aot.recorded(CALLS[name], monkeypatch)
    machine = aot.compiled(launch, card)
    data = launch.arguments["CHUNK"] // (32 * 4)                  # wide loads that cover a chunk
    assert machine.count(r"\bLDG\.E\S*\.128") == data and machine.count(r"\bSTG\.E\S*\.128") == data
    assert machine.count(r"\bLDG\.E\.128\.STRONG\.GPU") == data   # past the first cache
    assert not machine.count(r"\bLDG\.E\S*\.(U8|U16|S8|S16)")
    wide = [text for text in machine.instructions if re.search(r"\b(LDG|STG)\.E\S*\.128", text)]
    assert all("LDG" in text for text in wide[:data])             # a whole chunk is on its way before any is stored
