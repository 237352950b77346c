"""Whole experts decoded by the device's kernel under the interpreter: the reference's numbers."""
from __future__ import annotations

import pytest
import torch

from kernels.dense import dequantize
from kernels.gpu import dequantize as gpu_dequantize
from kernels.layout import Layout, default_group_size
from tests.support.random_experts import random_blobs

ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("hidden,neurons,n", [(256, 12, 3), (2880, 8, 2), (1088, 5, 1),
                                              *(pytest.param(hidden, 16, 2, marks=pytest.mark.slow)
                                                for hidden in (2048, 4096, 5120))])
def test_dequantize(hidden, neurons, n, dtype):
    layout = Layout(hidden, neurons, default_group_size(hidden))
    blobs = random_blobs(n, layout, torch.Generator().manual_seed(hidden))
    made = []
    for function in (dequantize.reference, gpu_dequantize.dequantize):
        gate_up = torch.full((n, 2 * neurons, hidden), torch.nan, dtype=dtype)
        down = torch.full((n, neurons, hidden), torch.nan, dtype=dtype)
        function(blobs, gate_up, down, layout)
        made.append((gate_up, down))
    for expected, found in zip(*made, strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=1e-6)
