"""Kernels alone and smaller cards, up to where a card is needed."""
from __future__ import annotations

import pytest
import torch

from engine.bench import cpu_kernels, single_kernels, synthetic
from engine.bench.gpu_kernels import bytes_above
from engine.core import MachineError, UserError
from kernels.layout import Layout
from tests.engine.bench.test_synthetic import tiny


def test_kernels_alone_read_what_they_must():
    layout = Layout(2048, 512, 128)
    assert single_kernels.must_read(layout, 8, 409, 819) == {
        "score": 8 * 512 * 1152, "apply": 409 * (2304 + 1152) + 819 * (1088 + 1152), "dense": 8 * 512 * 3456}
    shape, runs = synthetic.shape_of(tiny("qwen3.6-35b-a3b")), []
    rows = list(single_kernels.measured(shape, "cpu", lambda run: runs.append([run() for _ in range(3)]) or 0.5))
    n = shape.spec.top_k * shape.spec.neurons
    expected = single_kernels.must_read(shape.layout, shape.spec.top_k, int(0.1 * n), int(0.2 * n))
    found = {row["name"]: row for row in rows if row["sms"] == "all"}
    assert {name: row["bytes"] for name, row in found.items()} == expected
    assert all(row["us"] == 500 and row["gb_per_second"] == row["bytes"] / 0.5e6 for row in found.values())
    for first, *others in runs[:3]:  # other experts every time
        assert first.isfinite().all() and first.any() and not any(torch.equal(first, other) for other in others)
    if not torch.cuda.is_available():
        assert rows[-1]["sms"] == 28 and rows[-1]["sentence"].startswith("Green contexts do not work")


def test_the_processors_functions_are_set_against_a_copy(monkeypatch):
    pytest.importorskip("numba", reason="needs numba, which compiles these functions")
    monkeypatch.setattr(cpu_kernels, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(cpu_kernels, "WEIGHTS", 1 << 20)
    rows = list(cpu_kernels.measured(synthetic.shape_of(tiny("qwen3.6-35b-a3b")), rounds=2))
    assert [row["name"] for row in rows] == ["score", "apply", "dense", "linear8", "linear4"]
    for row in rows:
        assert row["of_copy"] == pytest.approx(row["gb_per_second"] / row["copy_gb_per_second"]) and row["bytes"] > 0
        assert row["gb_per_second"] == pytest.approx(row["bytes"] / row["us"] / 1e3)


def test_chosen_records_lie_where_apply_looks():
    experts, neurons = torch.tensor([5, 2], dtype=torch.int32), torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    assert single_kernels._record_places(experts, neurons, 4).tolist() == [20, 23, 8, 11]


def test_a_smaller_card_is_what_is_left_of_a_larger():
    assert bytes_above(11, free=75, total=80) == 69
    with pytest.raises(UserError, match="give --vram at most"):
        bytes_above(81, free=80, total=80)
    with pytest.raises(MachineError, match="Other programs"):
        bytes_above(2, free=70, total=80)
