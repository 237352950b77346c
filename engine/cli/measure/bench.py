"""`bench FOLDER`: tokens per second, time to first token, bytes and hits, and what bounds them.

On a graphics card also what a token costs kernel by kernel, on a smaller card (`--vram`) and on another (`--project`).
"""
from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path

from engine.cli import report
from engine.core import LEVELS, Options, UserError
from engine.paths import data_dir, typed
from engine.units import parse_bytes, rate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=typed, metavar="FOLDER", help="a compressed model or an uncompressed checkpoint")
    parser.add_argument("--level", choices=LEVELS, help="default: what the plan chooses for this machine")
    parser.add_argument("--near-bytes", type=parse_bytes, metavar="SIZE", help="near memory (default: all that fits)")
    parser.add_argument("--compare", action="store_true",
                        help="also run transformers' own experts on the same weights, uncompressed")
    parser.add_argument("--compare-llama-cpp", action="store_true",
                        help="also run llama.cpp at Q4_K_M on the same weights (the first time it is built, with pip)")
    parser.add_argument("--stream", action="store_true",
                        help="also what a token costs by kind of work, and more on its way through the engine")
    parser.add_argument("--source", type=typed, metavar="CHECKPOINT",
                        help="with --compare: take the uncompressed weights from here, not from FOLDER's 4-bit values")
    parser.add_argument("--vram", type=parse_bytes, metavar="SIZE", help="on a card: occupy what it has above this")
    parser.add_argument("--project", metavar="CARD", help="on a card: what a token would take on this one of the table")
    parser.add_argument("--table", type=typed, metavar="DIR", help="on a card: append its rows to DIR/<card>.csv")


def run(args: argparse.Namespace) -> dict:
    if args.source and not args.compare:
        raise UserError("--source is the checkpoint of the comparison; add --compare.")
    from engine.bench import gpu_kernels, step_profile, throughput
    from engine.machine import errors
    from engine.model import load
    gpu = None if args.project is None else step_profile.gpu_named(args.project)
    for_gpu = args.vram or args.project or args.table
    if for_gpu and args.device == "cpu":
        raise UserError("--vram, --project and --table are about a graphics card; leave --device cpu out.")
    load.check_folder(args.folder)
    device, why = errors.device_for("cuda" if for_gpu else args.device)
    if why:
        report(why)
    if device != "cpu" and (args.stream or args.compare_llama_cpp):
        raise UserError("--stream and --compare-llama-cpp measure on the processor; add --device cpu.")
    speeds = gpu_kernels.speeds() if device == "cuda" else None     # while it is empty
    held = gpu_kernels.reserve_vram(args.vram) if device == "cuda" else None
    options = Options(level=args.level, near_bytes=args.near_bytes, device=device)
    loaded = load.load(args.folder, options, report)
    if args.level and loaded.runtime.level != args.level:
        raise UserError(f"This model cannot run at level {args.level}: it offers {', '.join(loaded.runtime.levels)}.")
    if loaded.spec.table_bytes and (args.compare or args.compare_llama_cpp):
        raise UserError("A Mixture of Lookup Experts has a table in place of experts that another program could "
                        "compute; leave --compare and --compare-llama-cpp out.")
    measured = throughput.Bench(loaded, report=report, copy_bytes_per_second=speeds and speeds.link)
    document = measured.document()
    _print(document)
    if speeds and measured.decoder.on_device:
        document |= _on_gpu(measured, speeds, gpu, args.table)
    if args.compare:
        source = args.source and load.load(args.source, Options(level="full", device=device))
        document["compare"] = throughput.compare(loaded, source, report)
        _print_rows(document["compare"])
    if args.compare_llama_cpp:
        from engine.bench import llama_cpp
        document["compare_llama_cpp"] = llama_cpp.compare(loaded, data_dir(args.data), report)
        _print_rows(document["compare_llama_cpp"])
    if args.stream:     # last: it closes the model
        from engine.bench import stream
        document["parts"] = parts = stream.parts(loaded)
        told = [f"{kind} {ms:.2f} ms ({ms / sum(parts.values()):.1%})" for kind, ms in parts.items()]
        report(", ".join(told) + " a token, each step a call of its own" if told else
               "A token of this model is not one compiled call here, so its time is not told by kind of work.")
        document["stream"] = found = stream.overhead(loaded, options, report)
        report(f"through the engine {found['streamed_ms']:.2f} ms of processor time a token, bare "
               f"{found['bare_ms']:.2f}: {found['overhead_ms']:.2f} more")
    del held
    return document


def _print_rows(found: list[dict]) -> None:
    for row in found:
        bits = f"   {row['bits_per_weight']:.2f} bits a weight" if "bits_per_weight" in row else ""
        report(f"{row['implementation']:12} {row['level']:12} "
               f"prefill {rate(row['prefill_tokens_per_second']):>6} tokens/s   "
               f"decode {row['decode_tokens_per_second']:8.1f} tokens/s{bits}")


def _on_gpu(measured, speeds, gpu, folder: Path | None) -> dict:
    from engine.bench import gpu_kernels, rows
    table, found = None if folder is None else gpu_kernels.card_table(folder), []
    for row in chain([gpu_kernels.bandwidth_row(speeds)], measured.rows(speeds, gpu)):
        found.append(row)
        report(rows.text(row))
        if table:
            table.add(row)
    return {"rows": found, **({"table": str(table.path)} if table else {})}


def _print(document: dict) -> None:
    own = document["own_text"]
    kind = "a synthetic model, " if document.get("synthetic") else ""
    report(f"{kind}{document['device']}, level {document['level']}, {document['near_bytes']:,} bytes near\n"
           f"prefill {document['prefill_tokens']}: {document['prefill_tokens_per_second']:.1f} tokens/s   "
           f"first token after {document['time_to_first_token_ms']:.0f} ms\n"
           f"decode {document['decode_tokens']}: {document['decode_tokens_per_second']:.1f} tokens/s, "
           f"{document['far_bytes_per_token']:,.0f} far bytes a token, {document['hit_rate']:.1%} hits; copying alone "
           f"would allow {document['bound_tokens_per_second']:,.0f}, the plan expects "
           f"{document['planned_tokens_per_second']:.1f}\n"
           f"own text: {own['cold']['decode_tokens_per_second']:.1f} tokens/s cold "
           f"({own['cold']['hit_rate']:.1%} hits), "
           f"{own['warm']['decode_tokens_per_second']:.1f} warm ({own['warm']['hit_rate']:.1%} hits)")
    if document["note"]:
        report(document["note"])
