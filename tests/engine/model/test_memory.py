"""Near memory as the plan gives it is near memory as the cache takes it, and opening takes what was planned."""
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from engine.core import Options
from engine.library.compress import compress
from engine.model.load import Loaded, load
from tests.support.small_model import TOKENIZER_FILES


@pytest.fixture(scope="module")
def demo(repository: Path) -> Loaded:
    return load(repository / "assets" / "demo", Options(level="exact", device="cpu"))


@pytest.mark.parametrize("level", ["exact", "quality", "balanced", "fast", "floe"])
def test_everything_where_it_fits_and_the_least_where_nothing_does(demo: Loaded, level: str) -> None:
    runtime, planner = demo.runtime, demo.planner
    small = replace(planner, machine=replace(planner.machine, ram_free_bytes=10**8))
    runtime.set_level(level, small.near_bytes(level))
    assert runtime.near_bytes == small.near_bytes(level) == runtime.smallest_bytes()
    runtime.set_level(level, planner.near_bytes(level))
    assert runtime.near_bytes == planner.near_bytes(level) == runtime.everything_bytes()


@pytest.mark.parametrize("level", ["exact", "balanced"])
def test_in_between_the_cache_takes_what_the_plan_says(demo: Loaded, level: str) -> None:
    runtime, planner = demo.runtime, demo.planner
    for wish in (1_000_000, 5_000_000, 11_000_000):
        planned = planner.plan(level, Options(level=level, near_bytes=wish, device="cpu"))
        runtime.set_level(level, planned.near_bytes)
        assert runtime.near_bytes == planned.near_bytes <= wish


@pytest.mark.slow
def test_opening_takes_what_was_planned(tmp_path: Path, repository: Path) -> None:
    """In a process of its own, with a model that is large beside what Python takes for itself."""
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, moe_intermediate_size=128, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=16, head_dim=256, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=1024)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    for name in TOKENIZER_FILES:
        (tmp_path / "source" / name).write_bytes((repository / "assets" / "demo" / name).read_bytes())
    compress(tmp_path / "source", tmp_path / "made", trunk_bits=8, device="cpu")
    code = "import sys; from engine.model.load import load; from engine.core import Options; " \
           "print(load(sys.argv[1], Options(level='exact', device='cpu')).memory_check)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "made")], cwd=repository, capture_output=True,
                          text=True, check=True)
    assert done.stdout.strip().endswith("planned: as planned."), done.stdout
