"""Fits it, at which level, how fast: `plan(model, machine, wishes) -> Plan`, before a byte is downloaded.

A pure function of plain numbers: no torch, no clock, no file, no earlier bench of the same model, under 10 ms. It adds
up memory (the near side: VRAM, or RAM without a card; the far side: page-locked RAM, or the mapped file), asks
engine.planning.cost_model what a token costs at every level, and takes the best level that still reaches the wished
speed. More VRAM, RAM or bandwidth never gives a worse plan: every size is spent so that nothing shrinks when another
grows. Sizes are bytes; what is assumed and not measured is listed in the plan.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from engine.core import Machine, ModelSpec, Options, UserError
from engine.machine.process_memory import CUDA_CONTEXT_BYTES
from engine.machine.table import capability_of
from engine.planning import cost_model, explain, miss_curves
from engine.planning.arena import ArenaSizes, Split
from engine.planning.plan import RESTING, Near, Plan, PlanRequest
from engine.planning.sizes import (
    DEFAULT_CONTEXT,
    DEFAULT_TRUNK_BITS,
    FRAGMENTATION_BYTES,
    GRAPH_POOL_BYTES,
    PROCESS_BYTES,
    SLOT_TABLE_BYTES,
    WEIGHT_BYTES,
    expert_bytes,
    far_bytes,
    near_trunk_bytes,
    planned_chunk,
    prefill_bytes,
    router_copy_bytes,
    side_bytes,
    staging_bytes,
    table_bytes,
    trunk_bytes,
)
from kernels.layout import Layout, default_group_size

CHOICE = ("exact", "quality", "balanced", "fast")      # best to worst; `floe` and `full` only when asked for


def plan(model: ModelSpec, machine: Machine, wishes: PlanRequest | None = None,
         calibration: Mapping | None = None) -> Plan:
    """The best plan for a model on a machine. calibration: floe.json's own, if the folder has one. UserError when the
    model cannot be compressed at all or the context is longer than the model's."""
    wishes = wishes or PlanRequest()
    if wishes.context and wishes.context > model.context:
        raise UserError(f"{model.name} reads at most {model.context:,} tokens; ask for a context up to that.")
    layout = _layout(model, wishes)
    measured = (calibration or {}).get("levels")
    known = miss_curves.calibrated(calibration, model, layout) if measured else miss_curves.assumed(model, layout)
    if model.table_bytes and wishes.level not in (None, "exact"):
        raise UserError(f"{model.name} is kept as a table, which has no level but exact; leave the level out.")
    choice = (wishes.level,) if wishes.level else _offered(model, wishes, calibration)
    tried = [_at_level(model, machine, wishes, layout, known, level) for level in choice]
    best = _best(tried)
    everything = tuple((p.level, p.verdict, p.decode_tokens_per_second) for p in tried)
    return replace(best, levels=everything, assumptions=_assumptions(best, known, machine),
                   advice=_advice(model, machine, wishes, layout, known, best))


def _offered(model: ModelSpec, wishes: PlanRequest, calibration: Mapping | None) -> tuple[str, ...]:
    """A folder runs at the levels that it was calibrated for; what is still to be made may be calibrated for all. Rows
    of a table have but one."""
    if model.table_bytes:
        return ("exact",)
    measured = (calibration or {}).get("levels") or {}
    return tuple(level for level in CHOICE if level == "exact" or level in measured or not wishes.on_disk)


def _layout(model: ModelSpec, wishes: PlanRequest) -> Layout:
    try:
        return Layout(model.hidden, model.neurons, wishes.group_size or default_group_size(model.hidden))
    except ValueError as error:
        if wishes.level == "full":    # streams what is there; the layout only feeds numbers that `full` does not use
            return Layout(-(-model.hidden // 64) * 64, model.neurons, 64)
        raise UserError(f"{model.name} cannot be compressed: {error}") from error


def _best(tried: list[Plan]) -> Plan:
    """The first that reaches the wished speed, else the fastest that runs at all, else the one that lacks least."""
    running = [p for p in tried if p.verdict != "no"]
    if not running:
        return min(tried, key=lambda p: p.missing_bytes)
    return next((p for p in running if p.verdict == "fits"), max(running, key=lambda p: p.decode_tokens_per_second))


@dataclass(frozen=True)
class Planner:
    """How much near memory an open model gets: the plan of its level on the machine as it was before the weights were
    read; later its free memory has already been spent on them. trunk_bits, group_size: as stored; calibration:
    floe.json's."""

    spec: ModelSpec
    machine: Machine
    trunk_bits: int = 16
    group_size: int | None = None
    calibration: Mapping = field(default_factory=dict)

    def plan(self, level: str | None, options: Options | None = None) -> Plan:
        """level None: the plan's choice among those of the folder. UserError for a context that the model cannot
        read."""
        options = options or Options()
        wishes = PlanRequest(level, options.context, near_bytes=options.near_bytes, chunk=options.chunk,
                        trunk_bits=self.trunk_bits, group_size=self.group_size, on_disk=True)
        return plan(self.spec, self.machine, wishes, self.calibration or None)

    def near_bytes(self, level: str, options: Options | None = None) -> int:
        """What the user wishes, else what the plan gives the level."""
        if options is not None and options.near_bytes is not None:
            return options.near_bytes
        return self.plan(level, options).near_bytes


# --- one level ------------------------------------------------------------------------------------------------
def _at_level(model: ModelSpec, machine: Machine, wishes: PlanRequest, layout: Layout, known: miss_curves.Sparsity,
              level: str) -> Plan:
    bits = wishes.trunk_bits or (16 if level == "full" else DEFAULT_TRUNK_BITS[machine.device])
    context = wishes.context or min(model.context, DEFAULT_CONTEXT)
    chunk = min(wishes.chunk or planned_chunk(model, machine.device, context), context)
    disk = sum(trunk_bytes(model, bits)) + far_bytes(model, layout, level)
    common = {"model": model.name, "machine": machine.name, "device": machine.device, "level": level,
              "context": context, "chunk": chunk, "trunk_bits": bits, "disk_bytes": disk, "wished_speed": wishes.speed,
              "n_experts": model.n_experts_total}
    side = _on_gpu if machine.device == "cuda" else _on_cpu
    made = side(model, machine, wishes, layout, known, common)
    if not wishes.on_disk and disk > machine.disk_free_bytes and made.verdict != "no":
        made = replace(made, verdict="no", bound="disk", missing_bytes=disk - machine.disk_free_bytes)
    return made


def _on_gpu(model: ModelSpec, machine: Machine, wishes: PlanRequest, layout: Layout, known: miss_curves.Sparsity,
            common: dict) -> Plan:
    level, context, chunk = common["level"], common["context"], common["chunk"]
    embedding, trunk = near_trunk_bytes(model, common["trunk_bits"], "cuda")
    each, memory = expert_bytes(model, layout, level), _card_memory(model, machine, layout, context, chunk, trunk)
    far, tables = far_bytes(model, layout, level), table_bytes(model, level)
    # A layer is locked or it is not; the first ones are.
    locked = model.layers if far <= machine.pinned_limit_bytes else machine.pinned_limit_bytes * model.layers // far
    locked = 0 if model.table_bytes and locked < model.layers else locked     # a table's rows hold all layers
    arena = cost_model.arena_of(model, layout, known, level, each, model.experts * (model.layers - locked), True)
    free = machine.vram_free_bytes - tables - sum(size for _, size in memory)
    room = _beside_its_tables(free, arena)
    room = _room(model, arena, room if wishes.near_bytes is None else min(room, wishes.near_bytes))
    split, stay, unlocked, token = min(
        (_card_token(model, machine, layout, known, level, context, trunk, locked, split)
         for split in map(arena.divided, arena.sizes_worth_trying(room))),
        key=lambda made: sum(seconds for _, seconds in made[-1]))
    near, tables = _near(model, layout, level, arena, split), tables + SLOT_TABLE_BYTES * (
        split.slots + split.record_slots)
    memory = (*memory, ("near memory's tables", tables))
    vram, ram = sum(size for _, size in memory) + near.total_bytes, far + embedding + PROCESS_BYTES["cuda"]
    streamed = far - near.expert_bytes - (near.sketch_bytes if not near.expert_bytes else 0)
    streamed = chunk * model.token_table_bytes or streamed
    prefill = cost_model.chunk_on_gpu(model, machine, chunk, streamed, unlocked / model.layers)
    lacking = [("vram", arena.least_bytes - free)] if free < arena.least_bytes else []
    lacking += [("ram", ram - machine.ram_free_bytes)] if ram > machine.ram_free_bytes else []
    pinned = far * locked // model.layers
    return _finished(common, near, stay, token, prefill, lacking, memory=memory, vram_bytes=vram, ram_bytes=ram,
                     pinned_bytes=pinned, pageable_bytes=far - pinned, pageable_layers=unlocked,
                     kv_bytes=model.kv_bytes_per_token * context, near_free_bytes=machine.vram_free_bytes,
                     ram_free_bytes=machine.ram_free_bytes)


def _room(model: ModelSpec, arena: ArenaSizes, most: int) -> int:
    """Of near memory: of a table nothing stays near."""
    return arena.least_bytes if model.table_bytes else max(arena.least_bytes, most)


def _card_memory(model: ModelSpec, machine: Machine, layout: Layout, context: int, chunk: int,
                 trunk: int) -> tuple[tuple[str, int], ...]:
    """Video memory besides near memory. The step's own recurrent states have a second row (model/static_cache.py)."""
    return (("trunk", trunk), ("context memory (KV)", model.kv_bytes_per_token * context),
            ("recurrent and window state", model.state_bytes_at(context) + model.recurrent_bytes),
            ("side jobs' context memory", side_bytes(model, context)),
            ("driver context and kernels", CUDA_CONTEXT_BYTES), ("graph pool", GRAPH_POOL_BYTES),
            ("staging", staging_bytes(model, layout, capability_of(machine.compute_capability))),
            ("routers for looking ahead", router_copy_bytes(model)),
            ("prefill workspace", prefill_bytes(model, chunk, context)), ("reserve", FRAGMENTATION_BYTES))


def _beside_its_tables(free: int, arena: ArenaSizes) -> int:
    """Of `free` bytes what an arena may take; a slot has SLOT_TABLE_BYTES of tables."""
    unit = arena.record_bytes or arena.row_bytes
    return free * unit // (unit + SLOT_TABLE_BYTES)


def _card_token(model: ModelSpec, machine: Machine, layout: Layout, known: miss_curves.Sparsity, level: str,
                context: int, trunk: int, locked: int, split: Split) -> tuple:
    """-> the split, what it keeps, the layers that the processor has to fetch for, what a token costs then."""
    each, unlocked = expert_bytes(model, layout, level), model.layers - locked - split.kept // model.experts
    stay = cost_model.residency(model, layout, known, level, each, split)
    return split, stay, unlocked, cost_model.token_on_gpu(model, machine, layout, known, level, stay, trunk, each,
                                                          context, unlocked)


def _near(model: ModelSpec, layout: Layout, level: str, arena: ArenaSizes, split: Split) -> Near:
    if level == "full":
        return Near(expert_slots=split.slots, expert_bytes=arena.bytes_of(split))
    if level == "exact":
        n = split.slots
        return Near(n, n * model.neurons, split.rows * layout.sketch_bytes, split.rows * layout.records_bytes, n,
                    arena.bytes_of(split))
    return Near(split.slots, split.record_slots, split.rows * layout.sketch_bytes, split.record_rows * layout.record)


def _on_cpu(model: ModelSpec, machine: Machine, wishes: PlanRequest, layout: Layout, known: miss_curves.Sparsity,
            common: dict) -> Plan:
    """Where everything fits, near memory is the experts file itself, where the system keeps it in memory; else it is an
    arena as large as there is room for, and what is missing comes from the disk."""
    level, context, chunk = common["level"], common["context"], common["chunk"]
    kv = model.kv_bytes_per_token * context * WEIGHT_BYTES["cpu"] // 2
    far_each = expert_bytes(model, layout, level)
    near_each = 4 * model.expert_params if level == "full" else far_each
    far = far_bytes(model, layout, level)
    embedding, trunk = near_trunk_bytes(model, common["trunk_bits"], "cpu")
    memory = (("trunk", embedding + trunk), ("context memory (KV)", kv),
              ("recurrent and window state", 2 * model.state_bytes_at(context)),
              ("side jobs' context memory", 2 * side_bytes(model, context)), ("process", PROCESS_BYTES["cpu"]),
              ("prefill workspace", 4 * (chunk * (8 * model.hidden + 3 * model.top_k * model.neurons)
                                         + model.expert_params)))
    fixed = sum(size for _, size in memory)
    free = machine.ram_free_bytes - fixed
    arena = cost_model.arena_of(model, layout, known, level, near_each)
    room = _room(model, arena, free if wishes.near_bytes is None else wishes.near_bytes)
    near, stay = _near_on_cpu(model, layout, known, level, room, arena)
    ram = fixed + near.total_bytes
    # A program's answer that rests has as much context memory again. It comes beside what is near and the file that it
    # is read from, never in their place: more memory must not make a plan worse.
    resting = kv + 2 * model.state_bytes_at(context)
    beside = model.table_bytes or wishes.near_bytes is not None and near.total_bytes < far
    gives_way = machine.ram_free_bytes - ram - (far if beside else 0) >= resting
    # Beside an arena of the plan's own choice less than a row is left, now more, now less: no share of the file.
    left = max(0, machine.ram_free_bytes - ram) if model.table_bytes or wishes.near_bytes is not None else 0
    cached = min(1.0, left / far)
    read = common["trunk_bits"], trunk
    filled = context // 2       # a cache here grows, and a token reads what is in it: none of it, or all, or between
    token = cost_model.token_on_cpu(model, machine, layout, known, level, stay, read, filled, cached)
    prefill = cost_model.chunk_on_cpu(model, machine, chunk, level, far_each, stay, cached)
    lacking = [("ram", ram - machine.ram_free_bytes)] if ram > machine.ram_free_bytes else []
    if gives_way:
        memory, ram = (*memory, (RESTING, resting)), ram + resting
    return _finished(common, near, stay, token, prefill, lacking, memory=memory, vram_bytes=0, ram_bytes=ram,
                     pinned_bytes=0, kv_bytes=kv, near_free_bytes=machine.ram_free_bytes,
                     ram_free_bytes=machine.ram_free_bytes, resting_bytes=resting, gives_way=gives_way)


def _near_on_cpu(model: ModelSpec, layout: Layout, known: miss_curves.Sparsity, level: str, room: int,
                 arena: ArenaSizes) -> tuple[Near, cost_model.Residency]:
    """What engine/experts makes of `room` bytes."""
    n, far_each = model.n_experts_total, expert_bytes(model, layout, level)
    if level in ("exact", "full"):
        split = arena.divided(room)
        return (Near(expert_slots=split.slots, expert_bytes=arena.bytes_of(split)),
                cost_model.residency(model, layout, known, level, far_each, split))
    if room >= n * far_each:  # the whole file, in which each level finds its parts
        split = Split(n, n, n * model.neurons, n * model.neurons)
        return (Near(n, n * model.neurons, n * layout.sketch_bytes, n * layout.records_bytes),
                cost_model.residency(model, layout, known, level, far_each, split))
    tried = [(split, cost_model.residency(model, layout, known, level, far_each, split))
             for split in map(arena.divided, arena.sizes_worth_trying(room))]
    split, stay = min(tried, key=lambda made: made[1].far_bytes)
    return _near(model, layout, level, arena, split), stay


_BOUNDS = {"trunk": "vram bandwidth", "experts": "vram bandwidth", "attention": "vram bandwidth",
           "launches": "launches", "link": "link"}


def _finished(common: dict, near: Near, stay: cost_model.Residency, token: cost_model.Times, prefill: cost_model.Times,
              lacking: list[tuple[str, int]], **sums) -> Plan:
    decode = 1 / sum(seconds for _, seconds in token)
    slowest = max(token, key=lambda part: part[1])[0]
    bound = "cpu" if common["device"] == "cpu" else _BOUNDS[slowest]
    verdict = "fits" if decode >= common["wished_speed"] else "slow"
    if lacking:
        verdict, bound = "no", max(lacking, key=lambda part: part[1])[0]
    return Plan(**common, **sums, near=near, verdict=verdict, bound=bound, token=token, hit_rate=stay.hit_rate,
                far_bytes_per_token=stay.far_bytes, decode_tokens_per_second=decode,
                prefill_tokens_per_second=common["chunk"] / sum(seconds for _, seconds in prefill),
                missing_bytes=max((size for _, size in lacking), default=0))


# --- what to say ----------------------------------------------------------------------------------------------
def _assumptions(best: Plan, known: miss_curves.Sparsity, machine: Machine) -> tuple[str, ...]:
    said = []
    if not known.measured and best.level != "full":
        said.append("budgets and hit rates are assumed from another model until this one has been calibrated")
    if best.device == "cuda":
        said.append("the trunk's one-token forward is captured as transformers has it")
    elif not machine.gemv_bytes_per_second:
        said.append("this machine's speed has not been measured")
    return tuple(said)


def _advice(model: ModelSpec, machine: Machine, wishes: PlanRequest, layout: Layout, known: miss_curves.Sparsity,
            best: Plan) -> tuple[str, ...]:
    """What would make it better, each tried out: a wider link, more memory, a shorter context."""
    changes: list[tuple[str, Machine, PlanRequest]] = []
    if machine.device == "cuda":
        faster = replace(machine, link_bytes_per_second=2 * machine.link_bytes_per_second)
        changes.append(("a link twice as fast", faster, wishes))
        changes.append(("4 GB more video memory",
                        replace(machine, vram_free_bytes=machine.vram_free_bytes + 4 * 10**9), wishes))
    more_ram = {"ram_free_bytes": machine.ram_free_bytes + 32 * 2**30,
                "pinned_limit_bytes": machine.pinned_limit_bytes + 32 * 2**30}
    changes.append(("32 GB more memory", replace(machine, **more_ram), wishes))
    if best.context > 4096:
        changes.append(("a context of 4,096 tokens", machine, replace(wishes, context=4096)))
    said = []
    for what, other_machine, other_wishes in changes:
        other = _at_level(model, other_machine, other_wishes, layout, known, best.level)
        said += explain.gain(what, best, other)
    if best.verdict == "no":
        said += explain.lack(best)
    return tuple(said)
