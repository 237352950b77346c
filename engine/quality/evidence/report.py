"""The evidence as a page of Markdown with two plots beside it (SVG, written by hand: a few lines and words)."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from engine.policies.presets import PRESETS
from engine.quality.evidence.beforehand import GENERAL_TOKENS, ROUNDS, Made, Shared
from engine.quality.evidence.claims import SYSTEMS
from engine.quality.evidence.live import Live
from engine.quality.evidence.svg import COLOURS, EDGE, HEIGHT, WIDTH, drawing, words
from engine.quality.evidence.tested import TESTED
from engine.quality.simulate import Replay


@dataclass(frozen=True)
class Judged:
    """A line that the policies are held to: what was asked for, what was found, whether it holds."""

    asked: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Found:
    """All that was measured. Keys of the rows: the share of whole experts that is near."""

    model: str
    command: str
    tokens: tuple[int, int]
    replayed: dict[float, list[Replay]]
    live: dict[float, list[Live]]
    judged: list[Judged]
    made: list[Made]
    common: Shared


def page(found: Found, plots: Sequence[str]) -> str:
    trained, tested = found.tokens
    said = [f"# Policies on {found.model}", "",
            "What each idea of the field does on this one model, measured by one command; a row that loses stays in. "
            "The default of the engine is exact and uses none of the rows marked *changes the output*.", "",
            f"    {found.command}", "",
            f"Traces are the model's own answers: {trained:,} tokens to learn from, {tested:,} other ones to measure "
            "on. A share of near memory counts whole 4-bit experts. *Gap closed*: between LRU (0 %) and Belady's "
            "optimum (100 %), in bytes fetched on demand; *with ahead*: in all bytes that cross the link; with "
            "`miss=place` it may be more than all, since what is computed where it lies is not fetched. *Gain*: "
            "demand bytes less than the row above. Recall is of the layers from the third on.", "",
            "Rows that change the output are read from few tokens: a perplexity that moves by a percent is chance, KL "
            "is the surer figure.", ""]
    said += ["## Held to", "", "| asked for | found | |", "|---|---|---|"]
    said += [f"| {line.asked} | {line.found} | {'holds' if line.holds else 'does **not** hold'} |"
             for line in found.judged]
    said += ["", "## Held by tests", "", "| claim | |", "|---|---|"]
    said += [f"| {line.claim} | {line.found} |" for line in TESTED]
    for share, rows in found.replayed.items():
        said += ["", f"## Output unchanged, {share:.0%} near", "", *_replayed(rows)]
    said += ["", f"![Gap between LRU and the optimum that each rule closes]({plots[0]})"]
    for share, rows in found.live.items():
        said += ["", f"## Changes the output, {share:.0%} near", "", *_live(rows)]
    said += ["", f"![Bytes a token against perplexity]({plots[1]})", "", *_made(found)]
    said += ["", "## System by system", "", *_systems(found)]
    return "\n".join(said) + "\n"


def costs(found: Found) -> dict:
    """What `engine/policies/presets.py` tells people of the presets, from the rows of level `exact`."""
    presets = {}
    for name, text in PRESETS.items():
        for share, rows in found.live.items():
            exact = next(row for row in rows if row.level == "exact")
            if row := next((row for row in rows if text and row.name == text and row.level == "exact"), None):
                presets.setdefault(name, []).append({
                    "near_share": share, "perplexity": round(row.perplexity / exact.perplexity - 1, 4),
                    "kl": round(row.kl, 4), "moved": round(row.far_per_token / max(1.0, exact.far_per_token), 3)})
    return {"model": found.model, "command": found.command, "presets": presets}


def gap_closed(rows: Sequence[Replay], row: Replay, crossed: bool = False) -> float:
    """rows: LRU first, the optimum fourth."""
    worst, best = rows[0].far_per_token, rows[3].far_per_token
    moved = row.crossed_per_token if crossed else row.far_per_token
    return (worst - moved) / (worst - best) if worst > best else 0.0


def _replayed(rows: Sequence[Replay]) -> Iterable[str]:
    yield ("| policies | hits | demand bytes/token | ahead | wasted | gap closed | with ahead | recall k / 2k / 3k "
           "| gain |")
    yield "|---|---|---|---|---|---|---|---|---|"
    before = None
    for row in rows:
        counters, n = row.counters, max(1, row.tokens)
        recall = " / ".join(f"{share:.0%}" for share in row.mean_recall)
        gain = f"{1 - row.far_per_token / before:+.1%}" if before else ""
        before = row.far_per_token
        yield (f"| {row.name} | {counters.hit_rate:.1%} | {row.far_per_token:,.0f} | "
               f"{counters.speculative_bytes / n:,.0f} | {counters.wasted_bytes / n:,.0f} | "
               f"{gap_closed(rows, row):.0%} | {gap_closed(rows, row, True):.0%} | {recall} | {gain} |")


def _live(rows: Sequence[Live]) -> Iterable[str]:
    yield "| policies | level | perplexity | KL | far bytes/token | of the exact row | weight left out | gain |"
    yield "|---|---|---|---|---|---|---|---|"
    exact, before = {}, None
    for row in rows:
        exact.setdefault(row.level, row)
        share = row.far_per_token / max(1, exact[row.level].far_per_token)
        gain = f"{1 - row.far_per_token / before:+.1%}" if before else ""
        before = row.far_per_token
        yield (f"| {row.name} | {row.level} | {row.perplexity:.3f} | {row.kl:.4f} | {row.far_per_token:,.0f} | "
               f"{share:.0%} | {row.dropped:.2%} | {gain} |")


def _made(found: Found) -> Iterable[str]:
    yield "## Made beforehand"
    yield ""
    yield ("Smaller models by `specialise`, for the chats of `calibration.jsonl`: perplexity on pieces of 64 tokens, "
           f"of those that they were not fitted to, and on {GENERAL_TOKENS:,} tokens of `evaluation.jsonl`, which are "
           f"other chats. A search takes {ROUNDS} rounds.")
    yield ""
    yield "| way | experts a layer | on its kind | before | on other chats | before |"
    yield "|---|---|---|---|---|---|"
    for row in found.made:
        losses = row.losses
        yield (f"| {row.name} | {row.kept} of {row.experts} | {losses.held_out:.3f} | {losses.held_out_before:.3f} | "
               f"{losses.general:.3f} | {losses.general_before:.3f} |")
    yield ""
    yield f"A base expert in place of missing ones (`fidelity=base`): {_base(found.common)}."


def _base(common: Shared) -> str:
    said = (f"of a layer's experts {min(common.unexplained):.0%} to {max(common.unexplained):.0%} is each one's own, "
            "as a share of what experts without anything in common have")
    return said if common.is_there else f"refused, {said}"


def _systems(found: Found) -> Iterable[str]:
    share = min(found.replayed)
    yield f"Figures at {share:.0%} near."
    yield ""
    yield "| system | source | its claim | measured here |"
    yield "|---|---|---|---|"
    replayed = {row.name: row for row in found.replayed[share]}
    live = {row.name: row for row in found.live[share]}
    for system in SYSTEMS:
        said = [_short(found.replayed[share], replayed[name]) for name in system.rows if name in replayed]
        said += [f"`{name}`: perplexity {live[name].perplexity:.2f}, KL {live[name].kl:.3f}, "
                 f"{live[name].far_per_token:,.0f} bytes/token" for name in system.rows if name in live]
        said += [f"`{row.name}`: perplexity {row.losses.held_out_before:.2f} to {row.losses.held_out:.2f} on its kind, "
                 f"{row.losses.general_before:.2f} to {row.losses.general:.2f} on others"
                 for row in found.made if row.name in system.rows]
        said += [_base(found.common)] if "fidelity=base" in system.rows and not found.common.is_there else []
        yield f"| {system.name} | {system.source} | {system.claim} | {'; '.join(filter(None, (*said, system.note)))} |"


def _short(rows: Sequence[Replay], row: Replay) -> str:
    recall = f", recall {row.mean_recall[0]:.0%}" if row.recall else ""
    return f"`{row.name}`: hits {row.counters.hit_rate:.1%}, gap closed {gap_closed(rows, row, True):.0%}{recall}"


def bars(rows: dict[float, list[Replay]], chosen: Sequence[str]) -> str:
    """SVG: the share of the gap, all bytes counted, that each rule closes at each size."""
    step = (WIDTH - 220) / len(rows)
    drawn = []
    for at, (share, found) in enumerate(rows.items()):
        by_name = {row.name: row for row in found}
        x0 = 200 + at * step
        drawn.append(words(x0 + step / 2, 20, f"{share:.0%} near", "middle"))
        for line, name in enumerate(chosen):
            value, y = gap_closed(found, by_name[name], True), 34 + line * 22
            length = max(-1.0, min(1.0, value)) * step / 2.4
            left = x0 + step / 2.2 + min(0.0, length)
            drawn.append(f'<rect x="{left:.1f}" y="{y}" width="{abs(length):.1f}" height="14" '
                         f'fill="{COLOURS[0] if length >= 0 else COLOURS[1]}"/>')
            drawn.append(words(x0 + step / 2.2 + max(0.0, length) + 4, y + 12, f"{value:.0%}"))
            if not at:
                drawn.append(words(192, y + 12, name, "end"))
    return drawing(drawn, 44 + 22 * len(chosen))


def scatter(rows: dict[float, list[Live]]) -> str:
    """SVG: far bytes a token against perplexity, a colour for each size of near memory."""
    every = [row for found in rows.values() for row in found]
    most, low = max(row.far_per_token for row in every) or 1, min(row.perplexity for row in every)
    high = min(max(row.perplexity for row in every), 1.5 * low)  # what is worse stands at the edge
    drawn = [f'<path d="M{EDGE} {EDGE / 2} V{HEIGHT - EDGE} H{WIDTH - EDGE}" fill="none" stroke="#888"/>',
             words(WIDTH / 2, HEIGHT - 12, f"far bytes a token, up to {most:,.0f}", "middle"),
             words(EDGE, 16, f"perplexity, {low:.1f} to {high:.1f}")]
    for at, (share, found) in enumerate(rows.items()):
        drawn.append(words(WIDTH - EDGE, 40 + 18 * at, f"{share:.0%} near", "end", COLOURS[at]))
        for row in found:
            x = EDGE + row.far_per_token / most * (WIDTH - 2 * EDGE)
            y = HEIGHT - EDGE - (min(row.perplexity, high) - low) / max(1e-9, high - low) * (HEIGHT - 2 * EDGE)
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{COLOURS[at]}">'
                         f'<title>{escape(row.name)}, {row.level}</title></circle>')
    return drawing(drawn, HEIGHT)
