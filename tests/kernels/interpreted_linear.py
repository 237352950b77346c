"""Cases for Triton's interpreter (run by test_interpreted.py): a trunk matrix times a few tokens, its rows, and a
head's best."""
from __future__ import annotations

import pytest
import torch

from kernels.gpu import linear as gpu_linear
from kernels.gpu.trunk import head as gpu_head
from kernels.trunk.head import best_rows, split
from kernels.trunk.linear import Matrices, dequantize_rows, linear, linears
from tests.support.random_experts import random_matrix

ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(40, 256, 1), (33, 2880, 3), (7, 64, 4), (260, 128, 2)]                          # R, K, T
SLOW = [(64, 2048, 1), (8, 5120, 4), (262, 512, 1), (516, 192, 2), (6, 11008, 1)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter's time goes by operations, not by their width: an eighth of a card's blocks."""
    monkeypatch.setattr(gpu_linear, "BLOCKS", gpu_linear.BLOCKS // 8)
    monkeypatch.setattr(gpu_linear, "SPLIT_BELOW", gpu_linear.SPLIT_BELOW // 8)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows,columns,n_tokens", SHAPES + [pytest.param(*shape, marks=pytest.mark.slow)
                                                            for shape in SLOW])
def test_linear(rows, columns, n_tokens, bits):
    codes, scales = random_matrix(rows, columns, bits)
    x = torch.randn(n_tokens, columns) * torch.logspace(-2, 1, columns)
    for dtype, bias in ((torch.float32, torch.randn(rows)), (torch.bfloat16, None)):
        arguments = (x.to(dtype), codes, scales, bias)
        expected, found = linear.reference(*arguments), gpu_linear.linear(*arguments)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype],
                                   atol=ROUNDING[dtype] * float(expected.abs().max()))


def test_few_rows_are_spread_over_blocks_and_columns():
    """The cases above take both ways of summing, blocks of every size and one that is not full."""
    rows, _, splits = zip(*(gpu_linear.partition(rows, columns // 64, 16) for rows, columns, _ in SHAPES + SLOW),
                          strict=True)
    assert set(splits) == {1, 2, 3, 6} and set(rows) == {4, 8, 16}
    assert all(shape[0] % block for shape, block in zip(SLOW[-3:], rows[-3:], strict=True))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(bits, wrong):
    codes, scales = random_matrix(40, 128, bits)
    x = torch.ones(2, 128)
    x[1, 70] = wrong
    found = gpu_linear.linear(x, codes, scales)
    assert found[0].isfinite().all() and found[1].isnan().all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_decoded(bits, dtype):
    codes, scales = random_matrix(9, 1088, bits)
    made = []
    for function in (dequantize_rows.reference, gpu_linear.dequantize_rows):
        made.append(torch.full((9, 1088), torch.nan, dtype=dtype))
        function(codes, scales, made[-1])
    torch.testing.assert_close(*made, rtol=ROUNDING[dtype], atol=1e-6)


def parts_of(kinds: tuple, columns: int, is_biased: bool) -> Matrices:
    """kinds: (rows, bits) of each matrix; 16 bits are bfloat16, 32 float32."""
    made = []
    for seed, (rows, bits) in enumerate(kinds):
        plain = (torch.randn(rows, columns) / columns ** 0.5).to(torch.bfloat16 if bits == 16 else torch.float32)
        weight = random_matrix(rows, columns, bits, seed) if bits < 16 else (plain, None)
        made.append((*weight, torch.randn(rows) if is_biased else None))
    return Matrices(tuple(made))


@pytest.mark.parametrize("n_tokens, columns, kinds", [
    (1, 128, ((32, 4), (16, 4), (16, 4))), (3, 64, ((16, 8), (16, 8))), (2, 64, ((16, 4), (16, 8), (7, 16))),
    (4, 100, ((9, 16),)), (1, 2048, ((2, 32),)), (2, 64, ((16, 8), (16, 8), (16, 8), (3, 8)))])
def test_linears(n_tokens, columns, kinds):
    """One launch or several, with and without the norm, the bias and what is added."""
    x = torch.randn(n_tokens, columns) * torch.logspace(-1, 1, columns)
    for is_biased, norm in ((False, torch.rand(columns).bfloat16()), (True, None)):
        matrices = parts_of(kinds, columns, is_biased)
        residual = torch.randn(n_tokens, matrices.rows) if is_biased else None
        given = x, matrices, norm, 1e-6, residual
        for expected, found in zip(linears.reference(*given), gpu_linear.linears(*given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_matrices_of_one_kind_are_one_section():
    matrices = parts_of(((32, 4), (16, 4), (16, 4)), 64, True)
    assert gpu_linear.sections(matrices) == [list(matrices.parts)]
    assert len(gpu_linear.sections(parts_of(((32, 4), (16, 8)), 64, True))) == 2


@pytest.mark.parametrize("rows, columns, n_best, is_normed", [(70, 128, 3, True), (40, 192, 0, False)])
def test_best_rows(rows, columns, n_best, is_normed):
    """The rows that the reference finds, whoever says how many."""
    codes, scales = random_matrix(rows, columns, 8)
    head, x = Matrices(((split(codes), scales, None),)), torch.randn(1, columns)
    rest = (torch.rand(columns).bfloat16(), 1e-6) if is_normed else ()
    expected = best_rows.reference(x, head, n_best, *rest)
    for n in (n_best, torch.tensor([n_best])):
        torch.testing.assert_close(gpu_head.best_rows(x, head, n, *rest), expected, rtol=1e-4,
                                   atol=1e-4 * float(expected[expected.isfinite()].abs().max()))
