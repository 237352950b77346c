"""Work beside a device's main stream: a branch of the step that is joined before anything depends on it.

In a captured step the branch becomes one of the graph; without a card the work simply runs at once. Its stream has the
lowest priority, so that blocks of the main stream go first. At most one branch is open.
"""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

Tensor = torch.Tensor


class SideStream:
    def __init__(self, device: str) -> None:
        self._stream = torch.cuda.Stream(priority=0) if torch.device(device).type == "cuda" else None  # 0 is the lowest
        self._held: tuple[Tensor, ...] = ()

    def run(self, work: Callable[[], None], *tensors: Tensor) -> None:
        """Start work on what has been computed so far. tensors: what it reads; their memory is kept until `join`."""
        self.join()
        if self._stream is None:
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        self._held = tensors

    def join(self) -> None:
        """What comes next on the main stream waits for the branch."""
        if self._held:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._held = ()


class SideThread:
    """The same beside a processor's main thread, for work that waits for a disk."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "fetch ahead")
        self._running: Future | None = None

    def run(self, work: Callable[[], None], *tensors: Tensor) -> None:
        self.join()
        self._running = self._thread.submit(self._in_mode, torch.is_inference_mode_enabled(), work)

    @staticmethod
    def _in_mode(inference: bool, work: Callable[[], None]) -> None:
        """A new thread starts outside of inference mode, where tensors made inside may not be changed."""
        with torch.inference_mode(inference):
            work()

    def join(self) -> None:
        """Raises what the work raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
