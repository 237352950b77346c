"""A trunk matrix's codes: what each bit means, and the product straight from them."""
from __future__ import annotations

import pytest
import torch

from kernels.trunk import linear as module
from kernels.trunk.linear import MOST_TOKENS, decode, dequantize_rows, linear
from tests.support.random_experts import random_matrix


def by_hand(codes: torch.Tensor, scales: torch.Tensor, row: int, column: int) -> float:
    """One weight, as the description of the order says."""
    if codes.dtype == torch.int8:
        return float(scales[row, column // 64]) * int(codes[row, column])
    scale, offset = scales[row, column // 64].tolist()
    return scale * (int(codes[row, column // 2]) >> 4 * (column % 2) & 15) + offset


@pytest.mark.parametrize("bits", [8, 4])
def test_every_weight_is_where_the_order_says(bits):
    codes, scales = random_matrix(5, 192, bits)
    expected = [[by_hand(codes, scales, row, column) for column in range(192)] for row in range(5)]
    torch.testing.assert_close(decode(codes, scales), torch.tensor(expected))
    assert torch.equal(decode(codes[3], scales[3]), decode(codes, scales)[3])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_is_that_of_the_decoded_matrix(bits, dtype, biased, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 192 * 7)  # several blocks, the last one short
    codes, scales = random_matrix(50, 192, bits)
    x, bias = torch.randn(MOST_TOKENS, 192).to(dtype), torch.randn(50).to(dtype) if biased else None
    found = linear.reference(x, codes, scales, bias)
    expected = torch.nn.functional.linear(x.float(), decode(codes, scales), None if bias is None else bias.float())
    assert found.dtype == dtype and found.shape == (MOST_TOKENS, 50)
    torch.testing.assert_close(found, expected.to(dtype))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_number_stays_none(bits):
    codes, scales = random_matrix(6, 128, bits)
    x = torch.ones(1, 128)
    x[0, 70] = torch.nan
    assert linear(x, codes, scales).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_decoded_in_place(dtype):
    codes, scales = random_matrix(9, 128, 4)
    out = torch.empty(9, 128, dtype=dtype)
    dequantize_rows(codes, scales, out)
    assert torch.equal(out, decode(codes, scales).to(dtype))
