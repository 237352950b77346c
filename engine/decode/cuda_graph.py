"""The decode step as a CUDA graph: captured once for each kind of near memory, replayed for every token.

One graph for the sparse levels, one for `exact` and one for `floe`, each with and without look-ahead where that is
switched, in one memory pool. A capture runs every kernel first, because compiling and loading are not allowed inside
it, and puts back whatever those runs changed. Then the graph has to prove itself: one replay must give the logits that
running the step gave. A model that cannot be captured runs the same kernels one by one, and `reason` says so.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

from engine.decode.step import Step

WARM_UPS = 3        # torch's own advice: libraries pick their algorithms in the first runs
AGREEMENT = 2e-2    # share of the largest logit: a library may choose another algorithm inside a graph
Run = Callable[[], None]


class Capture:
    """How a run becomes a graph: all graphs of one model share a memory pool and a stream."""

    def __init__(self) -> None:
        # Above the priority of what runs beside it (engine/experts/side_stream.py).
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(priority=-1)

    def beside(self, run: Run, strictly: bool) -> None:
        """Run as the recording will, without recording. strictly: RuntimeError where the run waits for the device: that
        would break a recording, and a broken one leaves torch's allocator waiting for its end."""
        mode = torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            if strictly:
                torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(self._stream):
                run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Run) -> Run:
        """-> the graph's replay."""
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Only what this thread calls can break the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                run()
        finally:
            torch.cuda.set_stream(main)  # torch stays on its own when a broken capture cannot be ended
        return graph.replay


class Graphs:
    """A graph for each kind of near memory, made at its first launch. reason: why graphs do not work, else ""."""

    def __init__(self, step: Step, capture: Capture | None = None) -> None:
        self.step, self.reason = step, ""
        self._capture = capture or Capture()
        self._graphs: dict[tuple, Run] = {}

    def launch(self, position: int) -> None:
        """Compute the logits behind `position` tokens; returns before they are there."""
        key = self._key()
        if not self.reason and key not in self._graphs:
            self._make(key, position)
        self._graphs.get(key, self.step.compute)()

    def _key(self) -> tuple:
        """What a graph was made for: it holds the addresses of one arena and one branch of look-ahead."""
        runtime = self.step.runtime
        return runtime.n_arenas, runtime.kind, runtime.looks_ahead

    def _make(self, key: tuple, position: int) -> None:
        """A graph under `key`, or a reason why not; either way the sequence is where it was."""
        self._graphs = {old: graph for old, graph in self._graphs.items() if old[0] == key[0]}  # older arenas are gone
        before = self.step.save(position)
        try:
            graph, agrees = self._prove(before)
            if agrees:
                self._graphs[key] = graph
            else:
                self.reason = "A captured step gave other numbers than the same step run anew"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:  # whatever a model does in a capture
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self.reason = f"This model's step cannot be captured ({reason[0]})"
        if self.reason:
            self.reason += "; its kernels are launched one by one, which is slower."
        self.step.restore(before)

    def _prove(self, before: tuple) -> tuple[Run, bool]:
        """-> the graph, and whether its replay computes what the step itself does."""
        step = self.step
        for left in reversed(range(WARM_UPS)):
            self._capture.beside(step.compute, strictly=left == 0)
            expected = step.logits.clone()
            step.restore(before)
        graph = self._capture.record(step.compute)
        step.restore(before)
        graph()
        limit = AGREEMENT * float(expected.abs().max())
        return graph, bool((step.logits - expected).abs().max() <= limit)
