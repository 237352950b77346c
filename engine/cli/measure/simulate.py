"""`simulate TRACE`: what policies would have fetched, hit and wasted on a recorded run, without the model."""
from __future__ import annotations

import argparse
from pathlib import Path

from engine.cli import report
from engine.core import UserError
from engine.library.recommend import this_machine, with_benchmarks
from engine.machine import table
from engine.paths import typed
from engine.units import parse_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=typed, metavar="TRACE", help="a file that `trace` wrote")
    parser.add_argument("--near", required=True, metavar="SIZE",
                        help="near memory: a size, or a share of all experts such as 25%%")
    parser.add_argument("--policies", action="append", default=[], metavar="SPEC",
                        help="KIND=NAME:NUMBER,.. of predict, evict, admit, route, fidelity; may be repeated")
    parser.add_argument("--train", type=typed, metavar="TRACE",
                        help="another trace of the model, from which popularity, pinned and divided are learned")
    parser.add_argument("--learned", type=typed, metavar="FILE", help="predictors that `fit-predictor` trained")
    parser.add_argument("--machine", metavar="M", help="whose tokens/s to predict (default: this one)")


def run(args: argparse.Namespace) -> dict:
    from engine.policies.choice import parse
    from engine.policies.learned import load_predictors
    from engine.policies.trace import load_trace
    from engine.quality.simulate import Simulator, baselines, taught, tokens_per_second

    trace, train = load_trace(Path(args.trace)), args.train and load_trace(Path(args.train))
    if train and (train.run.layers, train.run.experts) != (trace.run.layers, trace.run.experts):
        raise UserError(f"{args.train} was recorded with another model than {args.trace}.")
    choices = [parse(text) for text in args.policies]
    near_bytes = _near(args.near, trace)
    machine = table.described(args.machine) if args.machine else with_benchmarks(
        this_machine(args.data, args.device)[0], args.data)
    simulator = Simulator(trace, near_bytes, learned=args.learned and load_predictors(Path(args.learned)))
    found = [*baselines(simulator, train), *(simulator.run_choice(
        choice, **taught(choice.evict.name, train, simulator)) for choice in choices)]
    speeds = [tokens_per_second(trace.run, replay, machine, near_bytes) for replay in found]
    report(f"{found[0].tokens:,} tokens of {trace.run.model} at {trace.run.level}, {near_bytes:,} bytes near "
           f"({simulator.split.slots} slots); tokens/s on {machine.name}\n"
           "policies                                    hits  demand/token   ahead   wasted  recall k/2k/3k   tokens/s")
    for replay, speed in zip(found, speeds, strict=True):
        recall = "/".join(f"{share:.0%}" for share in replay.mean_recall) or "-"
        counters, n = replay.counters, max(1, replay.tokens)
        report(f"{replay.name:42}{counters.hit_rate:7.1%}{replay.far_per_token:14,.0f}"
               f"{counters.speculative_bytes / n:10,.0f}{counters.wasted_bytes / n:8,.0f}{recall:>16}{speed:10.1f}")
    return {"model": trace.run.model, "level": trace.run.level, "near_bytes": near_bytes, "machine": machine.name,
            "rows": [replay.document() | {"tokens_per_second": speed}
                     for replay, speed in zip(found, speeds, strict=True)]}


def _near(text: str, trace) -> int:
    """Bytes; a share counts whole experts."""
    if not text.endswith("%"):
        return parse_bytes(text)
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        raise UserError(f"--near {text}: in front of % stands a number.") from None
    if not 0 < share <= 1:
        raise UserError(f"--near {text}: a share is above 0 % and at most 100 %.")
    return int(share * trace.run.layers * trace.run.experts * trace.run.blob_bytes)
