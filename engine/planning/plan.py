"""What a plan is: the wishes that it answers, what lies near, and everything that will happen. Data only."""
from __future__ import annotations

from dataclasses import dataclass

from engine.core import LEVELS, UserError

RESTING = "context memory of a program that rests"  # in Plan.memory


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks for; None lets the plan decide. speed: tokens per second. near_bytes: a ceiling.

    trunk_bits, group_size: of the folder, where they are known. on_disk: nothing has to be downloaded.
    """

    level: str | None = None
    context: int | None = None
    speed: float = 10.0
    near_bytes: int | None = None
    chunk: int | None = None
    trunk_bits: int | None = None
    group_size: int | None = None
    on_disk: bool = False

    def __post_init__(self) -> None:
        if self.level is not None and self.level not in LEVELS:
            raise UserError(f"There is no level {self.level!r}; choose one of {', '.join(LEVELS)}.")
        for name in ("context", "chunk", "speed"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be positive, not {value!r}.")


@dataclass(frozen=True)
class Near:
    """Near memory. Whole-expert slots (`exact`, `full`) are counted in expert_*; on a card sketch_* and record_* are
    their parts. At `full` they hold float32 weights."""

    sketch_slots: int = 0
    record_slots: int = 0
    sketch_bytes: int = 0
    record_bytes: int = 0
    expert_slots: int = 0
    expert_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return max(self.sketch_bytes + self.record_bytes, self.expert_bytes)


@dataclass(frozen=True)
class Plan:
    """What will happen. Sums in bytes; `memory` the near side's parts, `token` a token's seconds by part. gives_way:
    whether there is room for a second context memory of `resting_bytes`, in which a program's answer rests while the
    page's is written; else programs' answers are written to their ends."""

    model: str
    machine: str
    device: str
    verdict: str
    level: str
    context: int
    chunk: int
    trunk_bits: int
    near: Near
    vram_bytes: int
    ram_bytes: int
    pinned_bytes: int
    disk_bytes: int
    kv_bytes: int
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    bound: str
    memory: tuple[tuple[str, int], ...]
    token: tuple[tuple[str, float], ...]
    n_experts: int
    hit_rate: float
    far_bytes_per_token: float
    wished_speed: float
    missing_bytes: int = 0
    pageable_bytes: int = 0
    pageable_layers: int = 0  # of them, those that the processor fetches for
    near_free_bytes: int = 0
    ram_free_bytes: int = 0
    resting_bytes: int = 0
    gives_way: bool = False
    levels: tuple[tuple[str, str, float], ...] = ()
    assumptions: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def near_bytes(self) -> int:
        return self.near.total_bytes

    @property
    def planned_bytes(self) -> int:
        """Peak on the near side: VRAM on a card, the process's own memory without one."""
        return self.vram_bytes if self.device == "cuda" else self.ram_bytes

    @property
    def warm_bytes(self) -> int:
        """What warming up should take: on a card the whole peak; without one the trunk and near memory, because there
        context and activations come as the conversation needs them."""
        return self.vram_bytes if self.device == "cuda" else dict(self.memory)["trunk"] + self.near_bytes
