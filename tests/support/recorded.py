"""Record a decode step with make_fx and replay it: the CPU's model of a captured CUDA graph.

Every Python value is frozen at recording, as in a graph; a step that decides anything by a value of a tensor cannot be
recorded, or shows `_local_scalar_dense` or `nonzero`. The functions of kernels/ become one node each, as their Triton
versions are on a card (the references inside those nodes may look at values).
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from engine.decode.step import Step
from engine.experts import device, policy_hook, runtime, window
from engine.model import fused, host_embedding, packed, static_cache

KERNELS = ("age", "apply", "attend", "attend_latent", "choose", "choose_neurons", "dense", "dequantize_rows", "fill",
           "gated_linears", "linear", "linears", "look_ahead", "quantize", "resolve_experts", "resolve_neurons",
           "score", "score_up", "select", "select_above", "settle", "settled_linears")
LAUNCHES = {"apply": 2, "dense": 3, "age": 3, "attend_latent": 3}  # kernels on a card, where not one
VIEWS = ("view", "slice", "select", "unsqueeze", "expand", "permute", "transpose", "aten.t.", "split", "getitem",
         "empty", "detach", "alias")  # nothing for a device to do
# The last: a tensor made of Python numbers, which a device copies from pageable memory and waits for.
HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "masked_select", "unique", "lift_fresh")

_library = torch.library.Library("floe_recorded", "DEF")
_library.define("kernel(int which, Tensor(a!)[] tensors) -> Tensor[]")
_calls: list[tuple] = []


def _run(which: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    function, spec, leaves = _calls[which]
    given = iter(tensors)
    args, kwargs = tree_unflatten([next(given) if leaf is None else leaf[0] for leaf in leaves], spec)
    out = function(*args, **kwargs)
    return [] if out is None else list(out) if isinstance(out, tuple) else [out]


_library.impl("kernel", _run, "CompositeExplicitAutograd")


def as_node(function: Callable) -> Callable:
    """The same function, one operator to whoever records it; what is no tensor is frozen."""
    def call(*args, **kwargs):
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        _calls.append((function, spec, [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]))
        out = torch.ops.floe_recorded.kernel(len(_calls) - 1, tensors)
        return None if not out else out[0] if len(out) == 1 else tuple(out)
    return call


@contextmanager
def kernels_as_nodes():
    """Inside, the kernels that the device's runtime, the packed trunk, the embedding and the fused step imported are
    nodes: what a compiled one writes is seen by no recorder."""
    modules = runtime, device, policy_hook, window, packed, host_embedding, fused, static_cache
    before = [(module, name, getattr(module, name)) for name in KERNELS for module in modules
              if callable(getattr(module, name, None))]
    assert {name for _, name, _ in before} == set(KERNELS)
    try:
        for module, name, function in before:
            setattr(module, name, as_node(function))
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def from_here(step: Step, start: tuple, once: Callable[[], object], n: int, is_hooked: bool = True,
              ) -> tuple[list[list], list[torch.Tensor]]:
    """Packets and logits of n steps from `start` and an empty near memory on. Its hook, if it has one, has read the
    prompt; or is taken off."""
    step.restore(start)
    step.runtime.reset()
    if not is_hooked:
        step.runtime.hook = None
    elif step.runtime.hook is not None:
        step.runtime.hook.prompt_read()
    packets, logits = [], []
    for _ in range(n):
        once()
        packets.append(step.packet.tolist())
        logits.append(step.logits.clone())
    return packets, logits


def record(step: Callable[[], None]) -> tuple[torch.fx.GraphModule, list[str]]:
    """-> the recorded step, which runs once while it is recorded, and the names of its operators."""
    with kernels_as_nodes():
        graph = make_fx(lambda: step())()  # it counts the arguments that a function could take
    return graph, [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


class Recording:
    """A capture by make_fx."""

    def __init__(self) -> None:
        self.n_warm, self.n_graphs, self.n_replays = 0, 0, 0

    def beside(self, run, strictly: bool) -> None:
        self.n_warm += 1
        run()

    def record(self, run):
        graph, self.n_graphs = record(run)[0], self.n_graphs + 1

        def replay() -> None:
            self.n_replays += 1
            graph()
        return replay


def asks_the_host(names: list[str]) -> list[str]:
    """The recorded operators that would stop a device to look at a value."""
    return [name for name in names if any(word in name for word in HOST)]


def device_nodes(graph: torch.fx.GraphModule) -> int:
    """Nodes that the recorded step would have as a CUDA graph."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    ours = [_calls[node.args[0]][0].__name__ for node in nodes if "floe_recorded" in str(node.target)]
    others = [node for node in nodes if "floe_recorded" not in str(node.target)
              and not any(view in str(node.target) for view in VIEWS)]
    return len(others) + sum(LAUNCHES.get(name, 1) for name in ours)
