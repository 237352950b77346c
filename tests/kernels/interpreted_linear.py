"""Cases for Triton's interpreter (run by test_interpreted.py): a trunk matrix times a few tokens, and its rows."""
from __future__ import annotations

import pytest
import torch

from kernels.gpu import linear as gpu_linear
from kernels.trunk.linear import dequantize_rows, linear
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
