"""What a token costs behind 32,768 others: as many operations and nodes as behind 1,024, and the bytes of the rows that
it reads. Counted, not timed."""
from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, DynamicLayer

from engine.core import Options
from engine.library.compress import compress
from engine.model.fused import DeviceStep, HostStep, device_step, host_step
from engine.model.growing_cache import give_room
from engine.model.load import load
from engine.model.static_cache import StepCache
from tests.support import folders
from tests.support.recorded import record

pytest.importorskip("numba", reason="needs numba, which compiles what is counted")
from kernels.cpu import threads

Tensor = torch.Tensor
SHORT, LONG = 1_024, 32_768
LATENT = dict(kv_lora_rank=64, qk_rope_head_dim=16, head_dim=16)


@pytest.fixture(scope="module", params=[("qwen3_moe", dict(head_dim=32)), ("deepseek_v2", LATENT)], ids=lambda p: p[0])
def model(request, tmp_path_factory) -> torch.nn.Module:
    folder, (name, changes) = tmp_path_factory.mktemp("long"), request.param
    folders.checkpoint(name, folder / "checkpoint", hidden_size=128, max_position_embeddings=LONG + 64, **changes)
    compress(folder / "checkpoint", folder / "compressed", device="cpu", trunk_bits=8)
    return load(folder / "compressed", Options(level="exact", device="cpu")).model


class Operations(TorchDispatchMode):
    """torch's own, by name and the bytes of what they make, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out.nbytes if isinstance(out, Tensor) and out.untyped_storage().nbytes() == out.nbytes else 0
        self.found[str(func), made] += 1
        return out


def behind(n: int, step: HostStep) -> tuple[Counter, int, DynamicCache]:
    """One token behind n others: torch's operations, bytes that compiled tasks read, the cache."""
    cache, draw = DynamicCache(), torch.Generator().manual_seed(0)
    sizes = [layer.block.mixing for layer in step._layers]
    cache.layers = [DynamicLayer() for _ in sizes]
    for layer, mixing in zip(cache.layers, sizes, strict=True):
        heads, widths = ((mixing.cached, (mixing.size,) * 2) if hasattr(mixing, "cached") else
                         (1, (mixing.rank, mixing.turning)))
        layer.update(*(torch.randn(1, heads, n, width, generator=draw) for width in widths))
    give_room(cache)
    step([3], cache)  # makes room, and what belongs to positions
    read, call = [], threads.call

    def counted(own: threads.Step) -> None:
        if not own.whole:   # else its record is that of the task behind it
            read.append(threads.HEAD.unpack_from(own.record)[2])
        call(own)
    with pytest.MonkeyPatch.context() as patch, Operations() as operations:
        for module in ("attend", "linear"):
            patch.setattr(f"kernels.cpu.trunk.{module}.call", counted)
        patch.setattr(threads, "call", counted)
        step([4], cache)
    return operations.found, sum(read), cache


@torch.inference_mode()
def test_a_processors_token_reads_its_rows_and_nothing_else(model) -> None:
    step = host_step(model)
    step._token.takes = lambda cache: False     # the separate calls, each of which is seen
    for _ in range(2):      # an expert that is not near yet is read, too
        (operations, read, cache), (more, read_more, _) = (behind(n, step) for n in (SHORT, LONG))
    assert operations == more and sum(operations.values()) > 20
    row_bytes = sum(4 * (layer.keys.shape[1] * layer.keys.shape[3] + layer.values.shape[1] * layer.values.shape[3])
                    for layer in cache.layers)
    assert read_more - read == (LONG - SHORT) * row_bytes


@torch.inference_mode()
def test_a_recorded_step_is_the_same_for_every_context(model) -> None:
    """No node, and nothing that a node makes, grows with the context that was planned, or with the position."""
    made = []
    for context in (SHORT, LONG):
        cache = StepCache(model.config, context)
        step, token = device_step(model, cache), torch.tensor([3])
        assert isinstance(step, DeviceStep)
        step(token, cache)
        graph, _ = record(lambda: step(token, cache))       # noqa: B023
        cache.clock.pos.fill_(context - 1)
        made.append(nodes_of(graph, cache))
    assert made[0] == made[1] and len(made[0]) > 20


def nodes_of(graph: torch.fx.GraphModule, cache: StepCache) -> list[tuple[str, int]]:
    """Names and the numbers of what each makes, as it runs; the rows that it writes are the cache's own."""
    own, found = {layer.keys.data_ptr() for layer in cache.layers} | {layer.values.data_ptr()
                                                                      for layer in cache.layers}, []

    class Run(torch.fx.Interpreter):
        def run_node(self, node):
            out = super().run_node(node)
            if node.op == "call_function":
                found.append((str(node.target), sum(part.numel() for part in (out if isinstance(out, (list, tuple))
                                                                              else [out])
                                                    if isinstance(part, Tensor) and part.data_ptr() not in own)))
            return out
    Run(graph).run()
    return found
