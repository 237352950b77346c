"""From a folder to the evidence: traces, training, replays, live rows, and the lines that the policies are held to."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from engine.model.load import Loaded
from engine.policies.learned import fit
from engine.policies.trace import RoutingTrace
from engine.quality.evaluate import reference_of
from engine.quality.evidence.beforehand import shared, specialists
from engine.quality.evidence.first_tokens import restored, warm_up, while_typing
from engine.quality.evidence.live import LOSSY, SPARSE, Live, live_rows
from engine.quality.evidence.replayed import RECORDS, coverage, lossless_rows, record_rows
from engine.quality.evidence.report import Found, Judged, gap_closed
from engine.quality.recorder import Recorder, record
from engine.quality.simulate import Replay, by_popularity
from engine.quality.texts import CALIBRATION_TEXT, EVALUATION_TEXT, read_tokens

SHARES = (0.25, 0.5, 0.75)
EPOCHS = 8
LONGEST_ANSWER = 96
SPECIALIST_TOKENS, SPECIALIST_SHARE = 17_500, 18  # 200 pieces to compare on; fewer where little is measured at all
Report = Callable[[str], None]


def gather(loaded: Loaded, folder: Path, command: str, n_train: int, n_test: int, n_live: int, report: Report) -> Found:
    """folder: where the model lies; n_train, n_test: tokens of the traces; n_live: that are predicted with a policy
    live, each."""
    run = loaded.runtime.far
    whole = run.layers * run.experts * run.expert_bytes
    train = _trace(loaded, CALIBRATION_TEXT, n_train, "exact", report)
    test = _trace(loaded, EVALUATION_TEXT, n_test, "exact", report)
    report("training the predictors")
    learned = fit(train, EPOCHS)
    replayed, live, common = {}, {}, shared(loaded.runtime)
    lossy = (*LOSSY, "fidelity=base") if common.is_there else LOSSY
    documents = read_tokens(EVALUATION_TEXT, loaded.tokenizer, n_live)
    popular = [divmod(int(thing), run.experts) for thing in by_popularity(train)]
    with torch.inference_mode():
        asked = [(ids, reference_of(loaded, ids)) for ids in documents]
    sparse = _trace(loaded, EVALUATION_TEXT, n_test, "balanced", report) if (
        "balanced" in loaded.runtime.levels) else None
    for share in SHARES:
        report(f"replaying at {share:.0%}")
        replayed[share] = lossless_rows(train, test, int(share * whole), learned)
        live[share] = live_rows(loaded, asked, int(share * whole), popular, "exact", lossy, report)
        if sparse is not None:
            live[share] += live_rows(loaded, asked, int(share * whole), popular, "balanced", SPARSE, report)
    judged = _judged(train, test, sparse, replayed, live, whole, learned)
    made = specialists(folder, loaded.tokenizer, min(SPECIALIST_TOKENS, SPECIALIST_SHARE * n_train), report)
    return Found(test.run.model, command, (len(train.steps), len(test.steps)), replayed, live, judged, made, common)


def _trace(loaded: Loaded, prompts: Path, n_tokens: int, level: str, report: Report) -> RoutingTrace:
    report(f"recording {n_tokens} tokens at {level}")
    runtime = loaded.runtime
    runtime.set_level(level, None)
    recorder = Recorder(loaded, 3, True)
    record(loaded, prompts, recorder, n_tokens, LONGEST_ANSWER)
    return recorder.trace(loaded.spec.name)


def _judged(train: RoutingTrace, test: RoutingTrace, sparse: RoutingTrace | None, replayed: dict[float, list[Replay]],
            live: dict[float, list[Live]], whole: int, learned: dict) -> list[Judged]:
    rows = replayed[0.25]
    named = {row.name: row for row in rows}
    copied = [row for row in rows[6:] if "miss=place" not in row.name]
    best = max(copied, key=lambda row: gap_closed(rows, row, True))
    closed, routers = gap_closed(rows, best, True), named["predict=next:1"].mean_recall[0]
    network, popularity = (named[f"predict={name}"].mean_recall[1] for name in ("sequence", "popularity"))
    plain, gated = named["predict=none,free=layer"], named["predict=none,free=layer,admit=third,miss=place"]
    uploads = [(row.counters.far_bytes - row.passed_bytes) / row.tokens for row in (plain, gated)]
    everybody, own = coverage(train, test, 0.5)
    warm, again = warm_up(test, int(0.25 * whole), learned), restored(test, int(0.25 * whole))
    typing = while_typing(train, test, int(0.25 * whole), learned)
    found = [
        Judged("the best lossless choice closes a quarter of the gap between LRU and the optimum at 25 % near, all "
               "bytes counted", f"`{best.name}` closes {closed:.0%}", closed >= 0.25),
        Judged("admission halves what is copied at the same hits, 25 % near, the rest computed where it lies",
               f"{uploads[1] / max(1.0, uploads[0]):.0%} of the bytes, hits {plain.counters.hit_rate:.1%} and "
               f"{gated.counters.hit_rate:.1%}",
               uploads[1] <= 0.5 * uploads[0] and gated.counters.hit_rate >= plain.counters.hit_rate - 0.01),
        Judged("the next router's recall is 75 % or more", f"{routers:.1%}", routers >= 0.75),
        Judged("the sequence network's recall of 2k guesses is 10 points above popularity's",
               f"{network:.1%} against {popularity:.1%}", network >= popularity + 0.1),
        Judged("a conversation's profile covers 5 points more than popularity at 50 %",
               f"{own:.1%} against {everybody:.1%}", own >= everybody + 0.05),
        Judged("a draft's warm-up lowers the misses of the first 16 tokens, 25 % near, nothing near before",
               _shares(warm), warm["expected of the draft"] < warm["cold"]),
        Judged("habits, asked while a draft is written, lower the misses of the first 16 tokens, 25 % near, in a "
               "conversation after the other", _shares(typing),
               typing["what similar ones took"] < min(typing["as it was left"], typing["what everybody took"])),
        Judged("a conversation's working set, restored, lowers the misses of its next 16 tokens, 25 % near",
               _shares(again), again["restored"] < again["as it was left"])]
    return found + _judged_live(live) + (_judged_records(sparse, replayed, whole) if sparse is not None else [])


def _shares(found: dict[str, float]) -> str:
    return ", ".join(f"{name}: {share:.1%}" for name, share in found.items())


def _judged_live(live: dict[float, list[Live]]) -> list[Judged]:
    exact, *others = (row for row in live[0.25] if row.level == "exact")
    good = [row for row in others if row.name.startswith("route=near:") and row.perplexity <= 1.01 * exact.perplexity]
    best = min(good, key=lambda row: row.far_per_token, default=exact)
    moved = best.far_per_token / max(1.0, exact.far_per_token)
    only = [row for rows in live.values() for row in rows if row.name.startswith("route=near-only")]
    same, placed = (next(row for row in others if row.name == name) for name in (
        "evict=popularity,free=layer", "free=layer,admit=third,miss=place"))
    return [Judged("*prefer cached* at +1 % perplexity moves 70 % of the bytes or less, 25 % near",
                   f"`{best.name}`: {moved:.0%}, perplexity {best.perplexity / exact.perplexity - 1:+.2%}",
                   moved <= 0.7),
            Judged("*cached only* moves no byte in decode",
                   f"{sum(row.counters.far_bytes + row.counters.speculative_bytes for row in only):,} bytes",
                   all(row.counters.far_bytes + row.counters.speculative_bytes == 0 for row in only)),
            Judged("another rule of eviction changes no output",
                   f"perplexity {same.perplexity!r} and {exact.perplexity!r}",
                   same.perplexity == exact.perplexity and same.kl == exact.kl),
            Judged("where a missing expert is computed changes no output",
                   f"perplexity {placed.perplexity!r}, {placed.far_per_token / max(1.0, exact.far_per_token):.0%} of "
                   "the bytes copied", placed.perplexity == exact.perplexity and placed.kl == exact.kl)]


def _judged_records(sparse: RoutingTrace, replayed: dict[float, list[Replay]], whole: int) -> list[Judged]:
    found = []
    for share, most in ((0.25, 0.8), (0.5, 0.4)):
        moved = {row.name: row.far_per_token / max(1.0, replayed[share][0].far_per_token)
                 for row in record_rows(sparse, int(share * whole))}
        best = min((name for name in moved if name in RECORDS), key=moved.get)
        found.append(Judged(f"`balanced`, caching records, moves {most:.0%} of LRU on whole experts or less, "
                            f"{share:.0%} near, by the best of its rows", f"`{best}`: {moved[best]:.0%}; "
                            + ", ".join(f"`{name}`: {part:.0%}" if name in RECORDS else f"{name}: {part:.0%}"
                                        for name, part in moved.items() if name != best), moved[best] <= most))
    return found
