"""How long one token and one prompt chunk take: bytes over bandwidths, plus what every layer costs anyway.

Two devices, one shape of answer: a tuple of (what, seconds) that the planner adds up and explains. Every term falls or
stays when a bandwidth or a near size grows; the planner's promise that a better machine never gets a worse plan rests
on it. The constants are measured or computed elsewhere and say where. Pure numbers: no torch, no bench of the model.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from engine.core import Machine, ModelSpec
from engine.planning.arena import ArenaSizes, Split
from engine.planning.miss_curves import Sparsity
from engine.planning.sizes import NESTED_FROM
from kernels.layout import Layout

Times = tuple[tuple[str, float], ...]

# Device-writing operations of one decoder layer when transformers' own one-token forward is captured with the experts
# as one operation, and Floe Chat's own kernels beside it. The larger of two counts: of a capture,
# and of the card that is not there (tests/fake_card, less SPARSE_NODES). Of those with a fused step
# (engine/model/fused.py) that card's count alone, look-ahead's included; deepseek_v3 as deepseek_v2, not counted.
LAYER_NODES = {"qwen3_5_moe": 2, "qwen3_next": 2, "qwen3_moe": 1, "olmoe": 1, "gpt_oss": 1, "mixtral": 1,
               "gemma4": 3, "glm4_moe": 2, "glm4_moe_lite": 5, "deepseek_v2": 5,
               "deepseek_v3": 5, "laguna": 76, "longcat_flash": 191}
OTHER_LAYER_NODES = 72
WHOLE_NODES, SPARSE_NODES = 7, 9  # counted by tests/engine/decode/test_recorded_step.py
NODE_SECONDS = 1.6e-6          # 1.3-2 microseconds a node of a CUDA graph, computed
EAGER_NODE_SECONDS = 12e-6     # of the same, launched one by one from Python: an operation of torch, computed
HOST_FETCH_SECONDS = 0.4e-3    # a layer whose misses the host looks up: it waits for the card twice, computed
ATTENTION_SHARE = 0.2          # of the bandwidth: one query row of a few heads keeps few multiprocessors busy, computed
MISS_LATENCY_SECONDS = 4e-6    # a layer with few misses waits for the link's latency, not for its bandwidth
PAGEABLE_SHARE = 0.3           # a copy from memory that is not page-locked: 6-7 of 20-25 GB/s
MATRIX_SHARE = 0.5             # of a card's printed matrix operations in prefill
# Prefill that decodes writes every weight once and reads it once, 16 bits each; what the product of packed planes takes
# instead has not been measured, so it counts as much.
SCRATCH_BYTES = 4

CPU_DEFAULTS = {"gemv_bytes_per_second": 10e9, "copy_bytes_per_second": 5e9, "operation_seconds": 6e-6,
                "packed_bytes_per_second": 6e9, "expert_flops_per_second": 0.1e12, "flops_per_second": 0.1e12}
DISK_BYTES_PER_SECOND = 0.5e9  # a SATA SSD: experts that do not fit in memory are read from the file at every miss
# Small operations on a CPU, counted in the unit that engine.machine.benchmark measures: one decoder layer without its
# experts, one layer's step over whole experts, the sparse one, and what either costs more where not everything is near.
# They belong to the code, not to a model or a machine: fitted once, from the parts of a decode step timed one by one.
CPU_LAYER_OPERATIONS = 270
CPU_WHOLE_OPERATIONS, CPU_SPARSE_OPERATIONS = 60, 115
CPU_WHOLE_FAR_OPERATIONS, CPU_SPARSE_FAR_OPERATIONS = 450, 500
# Where a layer is some six calls (engine/model/fused.py), and a token is one as long as all is near (host_token.py).
CPU_ONE_CALL = frozenset({"qwen3_moe", "olmoe", "mixtral", "qwen3_5_moe", "qwen3_next"})
CPU_CALLED = CPU_ONE_CALL | {"gpt_oss", "gemma4", "glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3"}
# Around the one call of the embedded model Python takes .23 ms a token, CPU time, which the operations of that machine
# (1.4 us) measure; a layer's part of it is its cache's.
CPU_TOKEN_OPERATIONS, CPU_ONE_CALL_OPERATIONS, CPU_CALLED_OPERATIONS = 130, 5, 60
# What a compiled function reads a second, over `dense`, which is what `packed_bytes_per_second` measures: the newest
# rows of tests/bench/cpu.csv, mean of both kinds of instructions (tests/engine/planning/test_processor_costs.py). All
# of large pages; of a mapped file the system's cache may have small ones, which cost `score` more than `dense`.
CPU_SHARES = {"dense": 1.0, "score": 0.95, "apply": 0.60, "linear8": 1.06, "linear4": 0.95}
CPU_SCANNED = 0.57             # of the time of all rows, where the 20 best of 151,936 are wanted (NOTES.md)
CPU_ATTENTION_SHARE = 0.6      # of the bandwidth of `gemv`: keys and values meet several queries (NOTES.md)
FULL_FETCH_SHARE = 0.3         # of a plain copy's bandwidth: a checkpoint's weights are cast to float32
ROWS_SHARE = 0.05              # of a plain copy's bandwidth, when records are gathered one by one

@dataclass(frozen=True)
class Residency:
    """What is near and how often it suffices. far_bytes and needed_bytes per token; miss rates 0..1."""

    sketch_slots: int = 0
    record_slots: int = 0
    expert_slots: int = 0
    far_bytes: float = 0.0
    needed_bytes: float = 0.0

    @property
    def hit_rate(self) -> float:
        return 1.0 - self.far_bytes / self.needed_bytes if self.needed_bytes else 1.0


def arena_of(spec: ModelSpec, layout: Layout, sparsity: Sparsity, level: str, row_bytes: int, kept: int = 0,
             shared: bool = False) -> ArenaSizes:
    """What near memory has to be divided into. row_bytes: of a whole expert that is near; kept: of experts; shared: by
    all levels but `floe`."""
    if level in ("exact", "full"):
        return ArenaSizes(spec.n_experts_total, row_bytes, spec.top_k, kept=kept)
    most = sparsity.layer_most if shared else ceil(sparsity.budgets[level].layer_most)
    most = spec.top_k * spec.neurons if level == "floe" else most
    return ArenaSizes(spec.n_experts_total, layout.sketch_bytes, spec.top_k, spec.neurons, layout.record, most, kept)


def residency(spec: ModelSpec, layout: Layout, sparsity: Sparsity, level: str, far_bytes_each: int,
              split: Split) -> Residency:
    """What a token still has to fetch. far_bytes_each: of a whole expert, where it is far."""
    if spec.table_bytes:    # a row is never near
        return Residency(far_bytes=spec.token_table_bytes, needed_bytes=spec.token_table_bytes)
    n, layer_picks = spec.n_experts_total, spec.layers * spec.picks
    if level in ("exact", "full"):
        miss = _miss_rate(sparsity, "blob", "exact", split.slots, split.kept, n)
        needed = layer_picks * far_bytes_each
        return Residency(expert_slots=split.slots, far_bytes=miss * needed, needed_bytes=needed)
    budget = sparsity.budgets[level]
    sketches = layer_picks * layout.sketch_bytes
    records = budget.refined * layout.record + budget.down_only * layout.prefix
    far = sketches * _miss_rate(sparsity, "sketch", level, split.slots, split.kept, n)
    far += records * _miss_rate(sparsity, "record", level, split.record_slots, split.kept * spec.neurons,
                                n * spec.neurons)
    return Residency(split.slots, split.record_slots, far_bytes=far, needed_bytes=sketches + records)


def _miss_rate(sparsity: Sparsity, kind: str, level: str, slots: int, kept: int, total: int) -> float:
    """Of all that is asked for: what is kept never misses, the rest shares the other slots."""
    if slots >= total:
        return 0.0
    others = 1 - kept / total
    return others * sparsity.miss_rate(kind, level, (slots - kept) / others)


# --- on a card ------------------------------------------------------------------------------------------------
def token_on_gpu(spec: ModelSpec, machine: Machine, layout: Layout, sparsity: Sparsity, level: str, near: Residency,
                 trunk_bytes: float, expert_bytes: float, context: int, unlocked: int = 0) -> Times:
    """trunk_bytes: read per token. expert_bytes: of one whole expert as it lies near. context: counted as if all of it
    were read, which transformers' attention does; a fused step reads what is in it. unlocked: layers that the host
    fetches for, so that the step is not recorded."""
    width = machine.vram_bytes_per_second
    if level in ("exact", "full"):
        experts, own = spec.layers * spec.picks * expert_bytes, WHOLE_NODES
    else:
        budget, own = sparsity.budgets[level], SPARSE_NODES
        experts = near.needed_bytes + budget.refined * layout.sketch_row     # apply reads the sketch row again
    attention = spec.kv_bytes_per_token * context / ATTENTION_SHARE + 2 * spec.state_bytes_at(context)
    nodes = spec.decoder_layers * LAYER_NODES.get(spec.model_type, OTHER_LAYER_NODES) + spec.layers * own
    each = EAGER_NODE_SECONDS if unlocked or spec.table_bytes else NODE_SECONDS
    launches = nodes * each + unlocked * HOST_FETCH_SECONDS
    link = near.far_bytes * link_seconds_per_byte(machine, unlocked / spec.layers)
    link += spec.layers * MISS_LATENCY_SECONDS if near.far_bytes else 0.0
    return (("trunk", trunk_bytes / width), ("experts", experts / width), ("attention", attention / width),
            ("launches", launches), ("link", link))


def link_seconds_per_byte(machine: Machine, pageable: float) -> float:
    """pageable: share of what crosses the link that is not page-locked."""
    return (1 - pageable + pageable / PAGEABLE_SHARE) / machine.link_bytes_per_second


def chunk_on_gpu(spec: ModelSpec, machine: Machine, tokens: int, streamed_bytes: float, pageable: float) -> Times:
    """One prompt chunk: experts stream over the link while the previous ones are decoded and multiplied."""
    touched = _touched(spec, tokens) * spec.expert_params
    multiply = 2 * spec.active_params * tokens / (MATRIX_SHARE * machine.flops_per_second)
    compute = multiply + touched * SCRATCH_BYTES / machine.vram_bytes_per_second
    link = streamed_bytes * link_seconds_per_byte(machine, pageable)
    return (("link", link),) if link > compute else (("matrix products", compute),)


# --- on a CPU -------------------------------------------------------------------------------------------------
def _rate(machine: Machine, name: str) -> float:
    return getattr(machine, name) or CPU_DEFAULTS[name]


def token_on_cpu(spec: ModelSpec, machine: Machine, layout: Layout | None, sparsity: Sparsity, level: str,
                 near: Residency, trunk: tuple[int, float], context: int, cached: float) -> Times:
    """trunk: its bits, and the bytes of it that a token reads. cached: share of the experts file that stays in memory
    beside near memory. Experts are computed from their packed bytes, at `full` from float32."""
    gemv, copy = _rate(machine, "gemv_bytes_per_second"), _rate(machine, "copy_bytes_per_second")
    gathered = near.far_bytes / copy
    if level == "full":
        experts = spec.layers * spec.picks * spec.expert_params * 4 / gemv
        gathered /= FULL_FETCH_SHARE
    elif level == "exact":
        experts = near.needed_bytes / _packed(machine, "dense")
    else:
        experts = _sparse_seconds(spec, machine, layout, sparsity, level, near)
        gathered /= ROWS_SHARE
    misses = gathered + near.far_bytes * (1 - cached) / DISK_BYTES_PER_SECOND
    attention = 2 * spec.kv_bytes_per_token * context / CPU_ATTENTION_SHARE     # in float32
    attention += 2 * spec.state_bytes_at(context)                               # read and written
    small = _operations(spec, level, near.far_bytes > 0) * _rate(machine, "operation_seconds")
    return (("trunk", _trunk_seconds(spec, machine, *trunk)), ("experts", experts), ("attention", attention / gemv),
            ("small operations", small), ("misses", misses))


def _packed(machine: Machine, function: str) -> float:
    """Bytes a second of one of CPU_SHARES."""
    return CPU_SHARES[function] * _rate(machine, "packed_bytes_per_second")


def _sparse_seconds(spec: ModelSpec, machine: Machine, layout: Layout, sparsity: Sparsity, level: str,
                    near: Residency) -> float:
    """Sketches scored; what was kept applied, which reads its sketch rows again."""
    budget, sketches = sparsity.budgets[level], spec.layers * spec.picks * layout.sketch_bytes
    applied = max(0.0, near.needed_bytes - sketches) + (budget.refined + budget.down_only) * layout.sketch_row
    return sketches / _packed(machine, "score") + applied / _packed(machine, "apply")


def _trunk_seconds(spec: ModelSpec, machine: Machine, bits: int, n_bytes: float) -> float:
    """Codes are read no faster than numbers are; the head keeps 8 bits beside 4, and a nested one is scanned."""
    gemv = _rate(machine, "gemv_bytes_per_second")
    if bits == 16:
        return n_bytes / gemv
    eight, four = (min(gemv, _packed(machine, f"linear{kind}")) for kind in (8, 4))
    codes = spec.vocabulary * spec.hidden
    head = min(n_bytes, 8.25 / 8 * codes)
    scanned = CPU_SCANNED if codes >= NESTED_FROM and spec.model_type in CPU_CALLED else 1.0
    return scanned * head / eight + (n_bytes - head) / (eight if bits == 8 else four)


def _operations(spec: ModelSpec, level: str, is_far: bool) -> int:
    """Of one token. is_far: whether anything of the experts is not near."""
    whole = level in ("exact", "full")
    if spec.model_type in CPU_ONE_CALL and not is_far and level not in ("full", "floe"):
        return CPU_TOKEN_OPERATIONS + spec.layers * CPU_ONE_CALL_OPERATIONS
    layer = CPU_CALLED_OPERATIONS if spec.model_type in CPU_CALLED else CPU_LAYER_OPERATIONS
    experts = CPU_WHOLE_OPERATIONS if whole else CPU_SPARSE_OPERATIONS
    if is_far:
        experts += CPU_WHOLE_FAR_OPERATIONS if whole else CPU_SPARSE_FAR_OPERATIONS
    mixers = 2 if spec.model_type == "longcat_flash" else 1  # of a layer, each with a dense part behind it
    return spec.decoder_layers * mixers * layer + spec.layers * experts


def chunk_on_cpu(spec: ModelSpec, machine: Machine, tokens: int, level: str, expert_bytes: int, near: Residency,
                 cached: float) -> Times:
    """expert_bytes: of one whole expert as it lies far. Every expert that the chunk wants is read once, its codes
    multiplied as they are; at `full` those that are missing become float32. Of a table each token's row is read."""
    touched = _touched(spec, tokens)
    missing = touched * (1 - near.expert_slots / spec.n_experts_total)
    far = tokens * spec.token_table_bytes or missing * expert_bytes
    experts = 0 if spec.table_bytes else spec.layers * spec.picks * spec.expert_params
    flops, copied = (_rate(machine, name) for name in ("flops_per_second", "copy_bytes_per_second"))
    if level == "full":
        each, reading = flops, missing * spec.expert_params * 4 / copied
    else:
        each, reading = _rate(machine, "expert_flops_per_second"), touched * expert_bytes / _packed(machine, "dense")
    return (("matrix products", 2 * tokens * ((spec.active_params - experts) / flops + experts / each)),
            ("experts", reading), ("disk", far * (1 - cached) / DISK_BYTES_PER_SECOND))


def _touched(spec: ModelSpec, tokens: int) -> float:
    """Experts that a prompt's chunk reads: none of a table."""
    return 0 if spec.table_bytes else spec.layers * min(spec.experts, spec.picks * tokens)
