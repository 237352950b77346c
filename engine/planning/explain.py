"""A plan in words: the same sentences in the command line, the page and a bug report. Knows no model and no sum."""
from __future__ import annotations

from dataclasses import asdict

from engine.core import PROMISES
from engine.planning.plan import Plan
from engine.units import rate, size

# What a level means, for somebody who has never heard of it.
LEVEL_WORDS = {"full": "the original weights", "exact": "4 bits, nothing left out",
               **{level: f"perplexity at most {100 * promise:g} % above exact" for level, promise in PROMISES.items()},
               "floe": "the published FloE rule"}
_VERDICTS = {"fits": "fits", "slow": "runs, but slowly", "no": "does not fit"}
_BOUNDS = {
    "link": "the link between memory and card: what is not near has to cross it",
    "vram bandwidth": "the card's own memory bandwidth",
    "launches": "the number of small kernels per token",
    "cpu": "the processor",
    "vram": "video memory",
    "ram": "main memory",
    "disk": "free disk space",
}
_MEMORY = {"vram": "video memory", "ram": "main memory", "disk": "disk space"}


def plan_text(plan: Plan) -> str:
    """The whole plan, a few lines."""
    lines = [_headline(plan), memory(plan)]
    if plan.verdict != "no":
        lines += [_near(plan), _time(plan), *filter(None, [programs(plan)])]
    lines.append(f"What binds: {binds(plan)}.")
    if len(plan.levels) > 1 and plan.verdict != "no":
        others = ", ".join(f"{level} {rate(speed)}" for level, verdict, speed in plan.levels if verdict != "no")
        lines.append(f"Tokens/s by level: {others}.")
    if plan.advice:
        lines.append("Better: " + "; ".join(plan.advice) + ".")
    if plan.assumptions:
        lines.append("Assumed: " + "; ".join(plan.assumptions) + ".")
    return "\n".join(lines)


def _headline(plan: Plan) -> str:
    head = f"{plan.model} on {plan.machine}: {_VERDICTS[plan.verdict]}"
    if plan.verdict == "no":
        return f"{head}, {size(plan.missing_bytes)} of {_MEMORY[plan.bound]} are missing."
    return (f"{head}, at level {plan.level} ({LEVEL_WORDS[plan.level]}) about {rate(plan.decode_tokens_per_second)} "
            f"tokens/s (wished: {rate(plan.wished_speed)}), "
            f"prompts at {rate(plan.prefill_tokens_per_second)} tokens/s.")


def missing(plan: Plan) -> str:
    """What a machine lacks that cannot run the plan; "" where it can."""
    if plan.verdict != "no":
        return ""
    return f"Lacks {size(plan.missing_bytes)} of {_MEMORY[plan.bound]} at a context of {plan.context:,} tokens."


def programs(plan: Plan) -> str:
    """That a person waits for a program's answer, where one cannot rest; a card's recorded step has one context."""
    if plan.verdict == "no" or plan.device == "cuda" or plan.gives_way:
        return ""
    return (f"A program's answer is written to its end before the page's begins: {size(plan.resting_bytes)} more of "
            "context memory, in which it could rest, do not fit.")


def binds(plan: Plan) -> str:
    """What the plan's speed, or its not fitting, comes from."""
    return _BOUNDS[plan.bound]


def memory(plan: Plan) -> str:
    """What the near side's memory goes to, then main memory and disk."""
    where = "Video memory" if plan.device == "cuda" else "Memory"
    names = {"trunk": "trunk (all but the experts)"}
    parts = ", ".join(f"{names.get(name, name)} {size(n)}" for name, n in plan.memory if n)
    line = (f"{where}: {size(plan.planned_bytes)} needed, {size(plan.near_free_bytes)} free. With a context of "
            f"{plan.context:,} tokens: {parts}, experts {size(plan.near_bytes)}.")
    if plan.device == "cuda":
        line += (f" Main memory: {size(plan.ram_bytes)} needed, {size(plan.ram_free_bytes)} free, "
                 f"{size(plan.pinned_bytes)} page-locked.")
        if plan.pageable_bytes:
            line += f" The system locks no more: {size(plan.pageable_bytes)} of experts "
            line += ("stay pageable, and the processor fetches from them." if plan.pageable_layers
                     else "stay on the card for good.")
    return line + f" Disk: {size(plan.disk_bytes)} needed."


def _near(plan: Plan) -> str:
    near, n_experts = plan.near, plan.n_experts
    if plan.level in ("exact", "full"):
        kept = f"{near.expert_slots:,} of {n_experts:,} experts"
    else:
        kept = f"{near.sketch_slots:,} of {n_experts:,} experts' sketches ({size(near.sketch_bytes)}) and " \
               f"{near.record_slots:,} neurons' records ({size(near.record_bytes)})"
    where, source = ("On the card", "main memory") if plan.device == "cuda" else ("In memory", "the model's file")
    return (f"{where}: {kept}. {100 * plan.hit_rate:.0f} % of what a token needs is expected there, "
            f"{size(plan.far_bytes_per_token)} a token come from {source}.")


def _time(plan: Plan) -> str:
    parts = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in plan.token if seconds >= 5e-5)
    return f"One token: {1e3 * sum(s for _, s in plan.token):.1f} ms ({parts})."


def gain(what: str, before: Plan, after: Plan) -> list[str]:
    """A sentence when the change is worth saying: it fits now, or is at least a tenth faster."""
    if after.verdict == "no" or after.decode_tokens_per_second < 1.1 * before.decode_tokens_per_second:
        if not (before.verdict == "no" and after.verdict != "no"):
            return []
    return [f"with {what} {rate(after.decode_tokens_per_second)} tokens/s"]


def lack(plan: Plan) -> list[str]:
    have = {"vram": plan.near_free_bytes, "ram": plan.ram_free_bytes}.get(plan.bound)
    if have is None:
        return [f"free {size(plan.missing_bytes)} on the disk or choose another data folder"]
    return [f"it needs {size(have + plan.missing_bytes)} of free {_MEMORY[plan.bound]}, this machine has {size(have)}"]


def compare(plan: Plan, measured: int) -> str:
    """Bytes that warming up took against those planned for it, in one sentence; within 5 % is agreement."""
    planned, what = plan.warm_bytes, "video memory" if plan.device == "cuda" else "memory"
    if not planned:
        return f"Measured {size(measured)} of {what}; nothing was planned."
    apart = measured / planned - 1
    if abs(apart) <= 0.05:
        return f"Measured {size(measured)} of {what}, {size(planned)} planned: as planned."
    return (f"Measured {size(measured)} of {what}, {size(planned)} planned: {abs(apart) * 100:.0f} % "
            f"{'more' if apart > 0 else 'less'} than planned.")


def document(plan: Plan) -> dict:
    """The JSON of `plan --json`."""
    keys = ("verdict", "level", "vram_bytes", "ram_bytes", "pinned_bytes", "disk_bytes", "kv_bytes",
            "decode_tokens_per_second", "prefill_tokens_per_second", "bound", "model", "machine", "device",
            "context", "hit_rate", "far_bytes_per_token")
    levels = [{"level": n, "verdict": v, "decode_tokens_per_second": round(t, 2)} for n, v, t in plan.levels]
    return {**{key: getattr(plan, key) for key in keys}, "near": asdict(plan.near), "levels": levels,
            "memory": dict(plan.memory), "token_ms": {k: round(1e3 * s, 3) for k, s in plan.token},
            "assumptions": list(plan.assumptions), "text": plan_text(plan)}
