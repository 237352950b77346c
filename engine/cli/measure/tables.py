"""`tables CHECKPOINT`: the experiments behind the design, on any uncompressed Mixture-of-Experts checkpoint.

Three tables of perplexity change: which neurons to keep and by what rule; how well codes of few bits stand for the
weights; whole records against whole and half ones at the same bytes (a half record counts half).
"""
from __future__ import annotations

import argparse
import math
from pathlib import Path

from engine.cli import report
from engine.core import Options, UserError
from engine.paths import typed

KEPT = (0.5, 0.3, 0.2, 0.1)
BYTES = (0.3, 0.2, 0.1)
ROW = 256  # tokens that are read together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=typed, metavar="CHECKPOINT", help="an uncompressed checkpoint folder")
    parser.add_argument("--text", type=typed, action="append", metavar="FILE", help="as for eval; repeatable")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="of each text (4096)")
    parser.add_argument("--group-size", type=int, choices=(64, 128), default=64, help="of the quantised weights (64)")


def run(args: argparse.Namespace) -> dict:
    from engine.model import load
    from engine.quality.ablation import Comparison
    from engine.quality.texts import EVALUATION_TEXT

    if args.tokens < 2:
        raise UserError("--tokens must be at least 2.")
    loaded = load.load(args.checkpoint, Options(level="full", device="cpu"))
    if loaded.runtime.level != "full":
        raise UserError(f"{args.checkpoint} is compressed; give the checkpoint that it was made from.")
    if loaded.spec.hidden % args.group_size:
        raise UserError(f"Hidden size {loaded.spec.hidden} cannot be divided into groups of {args.group_size}.")
    paths = args.text or [EVALUATION_TEXT]
    tables = Tables([_rows(path, loaded, args.tokens) for path in paths], Comparison(loaded, args.group_size))
    return {"texts": [path.name for path in paths], "tokens": [rows.numel() for rows in tables.texts],
            "perplexity": [math.exp(loss) for loss in tables.losses], "group_size": args.group_size,
            "masks": tables.masks(), "quantisers": tables.quantisers(), "bytes": tables.at_equal_bytes()}


def _rows(path: Path, loaded, n_tokens: int):
    """int64 [R, ROW]: the documents one after the other, what ends a text between them; a short text is one row."""
    import torch

    from engine.quality.texts import read_tokens

    config = loaded.model.config
    ends = (loaded.tokenizer.bos_token_id, config.bos_token_id, loaded.tokenizer.eos_token_id, 0)
    between = next(token for token in ends if token is not None)
    ids = [token for document in read_tokens(path, loaded.tokenizer, n_tokens) for token in (*document, between)]
    n_rows = len(ids) // ROW
    return torch.tensor(ids[:n_rows * ROW]).view(n_rows, ROW) if n_rows else torch.tensor([ids])


class Tables:
    """The three experiments over the same texts; every result is the change of perplexity, one per text."""

    def __init__(self, texts: list, comparison) -> None:
        from engine.quality.ablation import Setting
        self.texts, self.comparison, self.setting = texts, comparison, Setting
        self.losses = [comparison.loss(rows, Setting()) for rows in texts]
        report("perplexity " + " / ".join(f"{math.exp(loss):.3f}" for loss in self.losses))

    def masks(self) -> list[dict]:
        rules = {"FloE, |u| per expert": dict(score="up", joint=False),
                 "oracle per expert": dict(score="product", joint=False),
                 "oracle, joint": dict(score="product"),
                 "2-bit sketch, joint": dict(score="sketch")}
        return [{"mask": rule, "kept": kept, "change": self._change(f"{rule}, {kept:.0%} kept", refined=kept, **how)}
                for kept in KEPT for rule, how in rules.items()]

    def quantisers(self) -> list[dict]:
        names = {"nested 4-bit": "nested", "2-bit view of gate and up": "sketch"}
        found = []
        for bits in (4, 3):
            name = self.comparison.add_plain(bits)
            found.append({"values": name, "change": self._change(name, values=name)})
            del self.comparison.weights[name]
        return found + [{"values": shown, "change": self._change(shown, values=name)} for shown, name in names.items()]

    def at_equal_bytes(self) -> list[dict]:
        """All at 4 bits. Half of the bytes for refined neurons, half for twice as many down-only ones."""
        rows = [(1.0, 1.0, 0.0), *((share, refined, (share - refined) * 2)
                                   for share in BYTES for refined in (share, share / 2))]
        return [{"bytes": share, "refined": refined, "down_only": down_only,
                 "change": self._change(f"{share} of the bytes: {refined:.0%} refined, {down_only:.0%} down-only",
                                        score="sketch", refined=refined, down_only=down_only, values="nested")}
                for share, refined, down_only in rows]

    def _change(self, shown: str, **setting) -> list[float]:
        losses = [self.comparison.loss(rows, self.setting(**setting)) for rows in self.texts]
        change = [math.exp(loss - before) - 1 for loss, before in zip(losses, self.losses, strict=True)]
        report(f"{shown:55} " + " / ".join(f"{value:+.1%}" for value in change))
        return change
