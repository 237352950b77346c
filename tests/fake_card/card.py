"""A card that is not there: torch's FakeTensors on "cuda", streams and events that only count, kernels that are noted.

FakeTensors have a shape, a type and a device but no numbers; an operation over two devices, or one that wants to know
a number, raises. So the runtime's own code runs as on a card, up to the arithmetic. It needs a build of torch with CUDA
in it (`python -m venv env; env/bin/pip install torch transformers pydantic psutil filelock jinja2 pytest`, on Linux
some 6 GB), no driver and no card; then `env/bin/python -m pytest tests/fake_card`.
"""
from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = ("aten._to_copy", "aten.copy_")
VIEWS = ("view", "slice", "select.int", "unsqueeze", "squeeze", "expand", "permute", "transpose", "aten.t.", "split",
         "empty", "detach", "alias", "lift", "narrow", "as_strided", "chunk", "unbind")  # no kernel runs


class Waits(RuntimeError):
    """The host would wait for the card."""


class Watch(TorchDispatchMode):
    """What runs inside it. bytes: of CUDA memory alive, and at most. nodes: kernels by name. crossings: copies between
    the host and the card."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak, self.nodes, self.crossings = 0, 0, Counter(), []
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), str(func)
        found = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name.startswith(COPIES) and len({leaf.device.type for leaf in (*found, *given)} - {"meta"}) > 1:
            self.crossings.append((name, tuple(given[-1].shape)))
        for leaf in found:
            if isinstance(leaf, FakeTensor) and leaf.device.type == "cuda":   # a packed weight is only a face
                self._hold(leaf.untyped_storage())
        if any(leaf.device.type == "cuda" for leaf in found) and not any(view in name for view in VIEWS):
            self.nodes[name] += 1
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            n_bytes = storage.nbytes()
            self.bytes += n_bytes
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._let_go, n_bytes)

    def _let_go(self, n_bytes: int) -> None:
        self.bytes -= n_bytes


class Stream:
    def __init__(self, *_, **__) -> None:
        self.waited = 0

    def wait_stream(self, other: Stream) -> None:
        self.waited += 1

    wait_event = wait_stream

    def synchronize(self) -> None:
        raise Waits("a stream is waited for")


class Event:
    def __init__(self, *_, **__) -> None:
        pass

    def record(self, *_) -> None:
        pass

    def synchronize(self) -> None:
        raise Waits("an event is waited for")


def _synchronize(*_) -> None:
    raise Waits("the card is waited for")


@contextmanager
def fake_card(capability: tuple[int, int] = (8, 6)) -> Iterator[Watch]:
    """Inside, "cuda" is such a card; what runs is watched."""
    from triton.runtime.jit import JITFunction
    watch, main = Watch(), Stream()

    def launched(kernel: JITFunction, *args, grid, warmup: bool, **kwargs) -> None:
        """Addresses of the card, or of the host's far memory, in place of a launch."""
        assert all(n > 0 for n in (grid(kwargs) if callable(grid) else grid)), (kernel.__name__, grid)
        assert not any(isinstance(value, torch.Tensor) and value.device.type == "meta" for value in args)
        watch.nodes[kernel.__name__] += 1

    def fused(query, key, value, *_, **__) -> torch.Tensor:
        """torch's attention on a card: one kernel that keeps nothing between its products."""
        watch.nodes["attention"] += 1
        return query.new_empty(*query.shape[:-1], value.shape[-1])
    about = SimpleNamespace(name="a card that is not there", major=capability[0], minor=capability[1],
                            multi_processor_count=28, total_memory=12 << 30)
    stand_ins = {"Stream": Stream, "Event": Event, "synchronize": _synchronize, "current_stream": lambda *_: main,
                 "stream": lambda stream: nullcontext(), "get_device_capability": lambda *_: capability,
                 "get_device_properties": lambda *_: about, "get_device_name": lambda *_: about.name,
                 "is_current_stream_capturing": lambda: False}
    # That a card is available is not said: FakeTensorMode would then ask the driver for it.
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(JITFunction, "run", launched))
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused))
        tensor = torch.tensor   # would start CUDA to lock the few numbers that it is given
        stack.enter_context(mock.patch.object(torch, "tensor", lambda *given, pin_memory=False, **named: tensor(
            *given, **named)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watch)
        yield watch
