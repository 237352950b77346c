"""What a test, a bench or a policy puts into a running model: see `Runtime.hook`."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from engine.experts.layer import LayerExperts


class Hook:
    """What looks into a layer's experts, or changes what they do, while a model runs: see `Runtime.hook`.

    This one changes nothing; override what is needed. All is tensors on the runtime's device. In a step that is
    recorded a hook may neither wait for the device nor decide by a value, and shapes stay; what it remembers is tensors
    that are changed in place. lossy: by what it changes answers, in the words of engine/policies/choice.py. leaves_out:
    whether it may give an expert weight 0, of which nothing is fetched then. sees_near: whether a step computes other
    numbers where other experts are near. asks_the_host: whether every step waits for the processor, so that none is
    recorded; beside: an engine/experts/device.py `Beside`, which computes what such a hook says stays far; note: a
    sentence about it.
    """

    lossy = note = ""
    leaves_out, sees_near, asks_the_host = True, False, False
    beside = None

    def state(self) -> list[Tensor]:
        """What a step changes of it, to be put back where a step is run only to be recorded."""
        return []

    def counted(self, counts: tuple[int, ...]) -> None:
        """Between tokens, as soon as the host knows what the runtime counted: `Runtime.counts`, of the last token that
        came back, which on a device is not the last that was launched."""

    def prompt_read(self) -> None:
        """A prompt has been read, its answer has not begun: what is fetched now belongs to no token."""

    def routed(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Before the experts: x [T, H] in the model's dtype, the router's ids int64 [T, k] and weights [T, k]
        -> the ids and weights that count. The router itself: x @ layer.router_weight.T."""
        return ids, weights

    def token_ended(self) -> None:
        """Between tokens, before slots are freed: where a policy says what may stay."""

    def keep_free(self, reserve: int) -> int:
        """Slots of a pool that are freed for the coming token; reserve: as the runtime would."""
        return reserve

    def demanded(self, layer: int, ids: Tensor) -> None:
        """A layer is about to ask for ids [T, k], -1 for none: where a policy may free slots."""

    def stays_far(self, layer: int, ids: Tensor) -> Tensor | None:
        """Of experts ids [1, k], -1 for none, that a step wants, bool [1, k]: what the processor computes where far
        memory has it, and nobody fetches. None: nothing."""
        return None

    def neurons_stay_far(self, layer: int, ids: Tensor, neurons: Tensor) -> Tensor | None:
        """The same of neurons [1, K] that a sparse level's step has chosen of experts ids [1, k]: bool [1, K]."""
        return None

    def token_begins(self) -> None:
        """Slots are free; nothing of the coming token has been asked for yet: where a policy may fetch ahead."""

    def guess(self, layer: LayerExperts, x: Tensor) -> list[tuple[int, Tensor]] | None:
        """Behind what a step's layer demands, x float32 [T, H]: (a later layer, ids int64 [1, n]) to be fetched ahead,
        as far as there is room. None: the runtime's own guess."""
        return None

    def instead(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        """Behind `routed`, in place of the experts -> their weighted sum [T, H]; None: they compute it."""
        return None

    def added(self, layer: LayerExperts, x: Tensor, out: Tensor) -> Tensor:
        """Behind the experts: their weighted sum [T, H] -> the one that counts."""
        return out

    def selected(self, layer: LayerExperts, ids: Tensor, weights: Tensor, neurons: Tensor, fidelity: Tensor,
                 ) -> tuple[Tensor, Tensor]:
        """Behind the selection of a sparse level's step, before records are fetched: neurons int32 [T, K], ascending,
        numbered through the k experts, then -1; fidelity int8 [T, K] (kernels/select.py) -> those that count."""
        return neurons, fidelity


class Hooked:
    """What has a hook; unset, it costs a comparison a layer. has_gaps: whether a pick may be of an expert without
    weights. is_recorded: whether a step may be recorded, so that nothing in it may look at a value."""

    hook: Hook | None = None
    has_gaps = False
    is_recorded = False

    @contextmanager
    def hooked(self, hook: Hook) -> Iterator[None]:
        """Inside, `hook` is the hook, in place of any other."""
        before, self.hook = self.hook, hook
        try:
            yield
        finally:
            self.hook = before

    @property
    def may_leave_out(self) -> bool:
        """Whether a pick of a step may have weight 0, of which nothing is fetched."""
        return self.has_gaps or self.hook is not None and self.hook.leaves_out
