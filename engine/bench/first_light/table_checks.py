"""Step 2: the tables of near memory, the choice of neurons and what comes over the link, to the bit, over several
tokens and at full sizes."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from engine.bench.first_light.kernel_checks import Compared, compared
from engine.bench.rows import Row
from kernels.evict import age
from kernels.layout import Layout
from kernels.pool import Pool, new_pool
from kernels.resolve import Link, Resolved, choose_neurons, look_ahead, resolve_experts, resolve_neurons
from kernels.select import BINS, histogram_of, select

Tensor = torch.Tensor


@dataclass(frozen=True)
class Sizes:
    """layout, experts, top_k: of the layer that resolves. clocks: tokens. scores: that `select` chooses from. slots:
    that `age` goes through."""

    layout: Layout = Layout(2048, 512, 128)
    experts: int = 256
    top_k: int = 8
    clocks: int = 7
    scores: tuple[int, ...] = (4096, 8192, 28_672)
    slots: int = 1_430_000


def tables(sizes: Sizes | None = None, device: str = "cuda") -> Iterator[Row]:
    sizes = sizes or Sizes()
    n_objects = sizes.experts * sizes.layout.neurons
    for n_slots in (0, n_objects // 50, n_objects // 4, n_objects):
        yield compared("resolve and age, neurons", f"{n_slots} slots", lambda n=n_slots: _life(
            sizes, sizes.layout.neurons, n, device, _resolve_neurons))
    for n_slots in (0, sizes.top_k, sizes.experts // 3, sizes.experts):
        yield compared("resolve and age, experts", f"{n_slots} slots", lambda n=n_slots: _life(
            sizes, 1, n, device, _resolve_experts))
    for n in sizes.scores:
        for kind in ("random", "ties"):
            yield compared("select", f"{n} {kind}", lambda n=n, kind=kind: _selected(n, kind, device))
    for n in sizes.scores:
        yield compared("choose_neurons", f"{n} scores", lambda n=n: _chosen(sizes, n, device))
    yield compared("look_ahead", f"{sizes.experts} experts", lambda: _looked_ahead(sizes, device))
    yield compared("age", f"{sizes.slots} slots", lambda: _aged(sizes.slots, device))


def _life(sizes: Sizes, per_expert: int, n_slots: int, device: str, resolve: Callable) -> Compared:
    """Several tokens of one layer through both versions, each on its own tables."""
    n_objects, draw, seen = sizes.experts * per_expert, torch.Generator().manual_seed(n_slots), ([], [])
    sides = [(new_pool(n_objects, n_slots, where), torch.zeros(5, dtype=torch.int64, device=where), where)
             for where in (device, "cpu")]
    for clock in range(1, sizes.clocks + 1):
        n_tokens = 1 + 3 * (clock % 2)
        ids = torch.stack([torch.randperm(sizes.experts, generator=draw)[:sizes.top_k] for _ in range(n_tokens)])
        n_kept = max(1, sizes.top_k * per_expert * 3 // 10)
        neurons = torch.stack([torch.randperm(sizes.top_k * per_expert, generator=draw)[:n_kept].sort().values
                               for _ in ids]).int()
        fidelity = torch.randint(0, 3, neurons.shape, generator=draw).to(torch.int8)
        for side, (pool, counts, where) in enumerate(sides):
            on = [tensor.to(where) for tensor in (ids, neurons, fidelity)]
            found = resolve(pool, *on, sizes.layout, torch.tensor([clock], dtype=torch.int32, device=where), counts,
                            torch.zeros((), dtype=torch.bool, device=where), side == 0)
            seen[side].extend(_listed(found))
            seen[side].extend(_age(pool, clock, n_kept, where, side == 0) if n_slots else [])
            seen[side].extend([*_listed_pool(pool), counts.clone()])
    return tuple(seen[0]), tuple(seen[1]), 0.0


def _resolve_neurons(pool: Pool, ids: Tensor, neurons: Tensor, fidelity: Tensor, layout: Layout, clock: Tensor,
                     counts: Tensor, done: Tensor, on_device: bool) -> Resolved:
    run = resolve_neurons.on_gpu() if on_device else resolve_neurons.reference
    return run(pool, neurons, fidelity, ids, 0, layout, clock, counts, done)


def _resolve_experts(pool: Pool, ids: Tensor, neurons: Tensor, fidelity: Tensor, layout: Layout, clock: Tensor,
                     counts: Tensor, done: Tensor, on_device: bool) -> Resolved:
    run = resolve_experts.on_gpu() if on_device else resolve_experts.reference
    return run(pool, ids, 0, layout.sketch_bytes, clock, counts, done)


def _age(pool: Pool, clock: int, reserve: int, where: str, on_device: bool) -> list[Tensor]:
    run = age.on_gpu() if on_device else age.reference
    now, most = (torch.tensor([n], dtype=torch.int32, device=where) for n in (clock, reserve))
    return [run(pool, now, most).clone().long()]


def _listed(found: Resolved) -> list[Tensor]:
    """What was resolved; of the misses those that are listed."""
    return [*found[:4], found.misses[:1 + int(found.misses[0])]]


def _listed_pool(pool: Pool) -> list[Tensor]:
    """Copies of every table; of the free stack what is on it."""
    n_free = int(pool.n_free)
    return [(table[:n_free] if name == "free" else table).clone() for name, table in pool._asdict().items()]


def _selected(n: int, kind: str, device: str) -> Compared:
    scores = torch.rand(4, n, generator=torch.Generator().manual_seed(n)) ** 4
    scores = (scores * 6).floor() / 8 if kind == "ties" else scores
    found, expected = [], []
    for n_refined, n_total in ((0, 0), (n // 10, 3 * n // 10), (n, n)):
        for histogram in (None, histogram_of(scores).to(device)):
            budget = [torch.tensor([value], dtype=torch.int32, device=device) for value in (n_refined, n_total)]
            found += select.on_gpu()(scores.to(device), *budget, max(1, n_total), histogram)
            expected += select.reference(scores, n_refined, n_total, max(1, n_total))
    return tuple(found), tuple(expected), 0.0


@dataclass
class _Linked:
    """A side with near memory of n_slots, and `extra` rows more, and far memory that it may read."""

    where: str
    far: Tensor
    n_slots: int
    extra: int

    def __post_init__(self) -> None:
        self.pool = new_pool(self.far.shape[0] * self.far.shape[1], self.n_slots, self.where)
        self.near = torch.zeros(self.n_slots + self.extra, self.far.shape[2], dtype=torch.uint8, device=self.where)
        self.turn = torch.zeros(4, dtype=torch.int32, device=self.where)
        self.counts = torch.zeros(5, dtype=torch.int64, device=self.where)
        self.link = Link(self.far.pin_memory() if self.where == "cuda" else self.far, self.near, self.turn)

    def now(self, clock: int) -> tuple[Tensor, Tensor, Tensor]:
        """clock, counts, done of a kernel."""
        return (torch.tensor([clock], dtype=torch.int32, device=self.where), self.counts,
                torch.zeros((), dtype=torch.bool, device=self.where))

    def tables(self) -> list[Tensor]:
        return [*_listed_pool(self.pool), self.counts.clone(), self.turn.clone()]


def _chosen(sizes: Sizes, n: int, device: str) -> Compared:
    """What is chosen of n scores, where its records are, the bytes that came; no count and no turn stays."""
    layout = Layout(sizes.layout.hidden, n // sizes.top_k, sizes.layout.group)
    draw, kept = torch.Generator().manual_seed(n), max(1, 3 * n // 10)
    far = torch.randint(0, 256, (sizes.top_k + 1, layout.neurons, layout.record), dtype=torch.uint8, generator=draw)
    seen, sides = ([], []), [_Linked(where, far, n // 3, kept) for where in (device, "cpu")]
    for clock in range(1, sizes.clocks + 1):
        scores, ids = torch.rand(1, n, generator=draw) ** 4, torch.randperm(sizes.top_k + 1, generator=draw)
        counted = torch.cat((histogram_of(scores), torch.zeros(2, BINS, dtype=torch.int32)))
        for found, side, run in zip(seen, sides, (choose_neurons.on_gpu(), choose_neurons.reference), strict=True):
            histogram, budget = counted.clone().to(side.where), torch.tensor([[kept // 2], [kept]]).int().to(side.where)
            found += run(scores.to(side.where), *budget, kept, histogram, ids[None, :sizes.top_k].to(side.where),
                         side.pool, 0, layout, *side.now(clock), side.link)
            found += *side.tables(), histogram
    return (*seen[0], sides[0].near), (*seen[1], sides[1].near), 0.0


def _looked_ahead(sizes: Sizes, device: str) -> Compared:
    """Sketches of the experts that a router would pick on the last row: some, as far as the bytes reach, none."""
    draw, each = torch.Generator().manual_seed(29), sizes.layout.sketch_bytes
    far = torch.randint(0, 256, (sizes.experts, 1, each), dtype=torch.uint8, generator=draw)
    router = torch.randn(sizes.experts, sizes.layout.hidden, generator=draw)
    seen, sides = ([], []), [_Linked(where, far, sizes.experts // 2, 0) for where in (device, "cpu")]
    for clock in range(1, sizes.clocks + 1):
        x = torch.randn(1 + clock % 2, sizes.layout.hidden, generator=draw)
        for found, side, run in zip(seen, sides, (look_ahead.on_gpu(), look_ahead.reference), strict=True):
            most = torch.tensor([each * (sizes.top_k, 2, 0)[clock % 3]], dtype=torch.int32, device=side.where)
            found += _listed(run(x.to(side.where), router.to(side.where), sizes.top_k, side.pool, 0, each,
                                 *side.now(clock), most, side.link))
            found += side.tables()
    return (*seen[0], sides[0].near), (*seen[1], sides[1].near), 0.0


def _aged(n_slots: int, device: str) -> Compared:
    """All slots taken, twice as many objects, a third of them wanted back."""
    found = []
    for where, run in ((device, age.on_gpu()), ("cpu", age.reference)):
        pool, draw = new_pool(2 * n_slots, n_slots, where), torch.Generator().manual_seed(3)
        pool.object_of.copy_(torch.arange(n_slots))
        pool.slot_of[:n_slots] = torch.arange(n_slots, dtype=torch.int32, device=where)
        pool.stamp.copy_(torch.randint(0, 3000, (n_slots,), generator=draw, dtype=torch.int32))
        pool.ahead.copy_(torch.randint(0, 2, (n_slots,), generator=draw, dtype=torch.int32))
        pool.n_free.zero_()
        now, most = (torch.tensor([n], dtype=torch.int32, device=where) for n in (3001, n_slots // 3))
        gone = run(pool, now, most).long()
        found.append((gone, *_listed_pool(pool)))
    return (*found, 0.0)
