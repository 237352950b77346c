"""`synth MODEL DEST | --in-memory`: a model of real shape with made-up weights, to measure speed with."""
from __future__ import annotations

import argparse

from engine.cli import report
from engine.core import LEVELS, MachineError, Options, UserError
from engine.paths import typed
from engine.units import parse_bytes, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name of the catalogue, such as qwen3.6-35b-a3b")
    parser.add_argument("dest", type=typed, nargs="?", metavar="DEST", help="folder to make")
    parser.add_argument("--in-memory", action="store_true", help="write no file: make it up, measure it, forget it")
    parser.add_argument("--layers", type=int, help="only its first layers")
    parser.add_argument("--trunk-bits", type=int, choices=(16, 8, 4), default=4, help="bits outside the experts")
    parser.add_argument("--repeat", type=float, help="share of picked experts that the last token picked too")
    parser.add_argument("--repeat-neurons", type=float, help="the same of neurons, where the expert is the same")
    parser.add_argument("--level", choices=LEVELS[1:], default="exact", help="with --in-memory: what is measured")
    parser.add_argument("--near-bytes", type=parse_bytes, metavar="SIZE", help="with --in-memory: near memory")


def run(args: argparse.Namespace) -> dict:
    if bool(args.dest) == args.in_memory:
        raise UserError("Give a folder to make, or --in-memory.")
    from engine.bench import synthetic
    shape = synthetic.shape_named(args.model, args.layers)
    calibration = synthetic.calibration_of(shape, _rate(args.repeat, synthetic.REPEAT),
                                           _rate(args.repeat_neurons, synthetic.REPEAT_NEURONS))
    document = {"synthetic": True, "model": shape.name, "layers": shape.spec.layers, "experts": shape.spec.experts,
                "experts_bytes": synthetic.bytes_of(shape), **calibration["synthetic"]}
    if args.in_memory:
        return document | _measured(args, shape, calibration)
    manifest = synthetic.write(shape, args.dest, args.trunk_bits, calibration, report=report)
    n_bytes = sum(file.bytes for file in manifest.files)
    report(f"{args.dest}: a synthetic {shape.title}, {size(n_bytes)}, {shape.spec.layers} layers; its answers mean "
           "nothing, its speed does")
    return document | {"folder": str(args.dest), "bytes": n_bytes}


def _measured(args: argparse.Namespace, shape, calibration: dict) -> dict:
    from engine.bench import synthetic_model, throughput
    try:
        options = Options(args.level, args.near_bytes, device=args.device)
        loaded = synthetic_model.open_in_memory(shape, calibration, options, report)
    except RuntimeError as error:
        raise MachineError(f"The model cannot be made up in memory ({str(error).splitlines()[0]}); take fewer "
                           "--layers.") from error
    try:
        found = throughput.Bench(loaded, report=report).document()
    finally:
        loaded.runtime.close()
    report(f"synthetic {shape.name}, level {found['level']}: {found['decode_tokens_per_second']:.1f} tokens/s, "
           f"{found['hit_rate']:.1%} hits")
    return found


def _rate(given: float | None, default: float) -> float:
    if given is not None and not 0 <= given <= 1:
        raise UserError(f"A repeat rate is a share between 0 and 1, not {given}.")
    return default if given is None else given
