"""A specialist as a folder: fewer experts, for texts of one kind, by mask, by merge or by search.

The folder is an ordinary compressed one, written by the same writer over as many runs as it takes: experts that stay
as they are keep their bytes, mixed ones are coded anew. What it loses on texts of its kind that it was not fitted to,
and on others, stands in its manifest and on its card. Levels have to be measured again: theirs were another model's.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.core import UserError
from engine.files.folder_writer import FolderWriter, expert_blob
from engine.files.manifest import MADE_OF, TRUNK, Manifest, experts_name
from engine.files.skeleton import experts_modules, model_spec
from engine.files.trunk import CODES, encode
from engine.model.load import load_tokenizer
from engine.policies.usage import SCORES, Usage
from engine.progress import Progress, Report, said, unheard
from engine.quality.requantize import digest
from engine.quality.specialists.examples import Batches, Counting, Examples, batches_of, examples_of, loss
from engine.quality.specialists.mixed_model import MixedModel, Source, matrices_of, routers_of
from engine.quality.specialists.mixture import Mixture, alike, masked, merged
from engine.quality.specialists.search import LEAST_EXAMPLES, search

Tensor = torch.Tensor
WAYS = ("mask", "merge", "search")
NOTE = MADE_OF[1]
SEARCHED = "search.partial.npz"  # in a folder that is not finished


@dataclass(frozen=True)
class Choice:
    """keep: share of the experts, above 0 and below 1. way: of WAYS; score: of SCORES, which experts are kept; rounds:
    of a search. text: what it is made for; general: other texts; n_tokens: of each that are read."""

    text: Path
    general: Path
    keep: float = 0.5
    way: str = "mask"
    score: str = "reap"
    rounds: int = 120
    n_tokens: int = 16_384

    def __post_init__(self) -> None:
        assert self.way in WAYS and self.score in SCORES
        if not 0 < self.keep < 1:
            raise UserError("--keep is the share of the experts that stay: more than 0, less than 1.")
        if self.rounds < 1 or self.n_tokens < 1:
            raise UserError("--rounds and --tokens must be at least 1.")


@dataclass(frozen=True)
class Losses:
    """Perplexities, of pieces of text: of the model and of the specialist, on texts of its kind that it was not fitted
    to and on others."""

    held_out_before: float
    held_out: float
    general_before: float
    general: float


def specialise(folder: Path, dest: Path, choice: Choice, report: Report = unheard,
               check: Callable[[], None] = lambda: None) -> Manifest:
    """Make the compressed folder `dest` from the compressed `folder`.

    check: is called within every expert and before every forward, and may raise. UserError: what cannot be made of this
    model or of so little text, a dest that holds something else. Finished files and rounds of a search survive any
    failure, and the next call goes on behind them.
    """
    source = Source(folder)
    n, tokenizer = kept_of(source.manifest, choice.keep), load_tokenizer(folder)
    examples = examples_of(choice.text, tokenizer, choice.n_tokens)
    if choice.way == "search" and examples.pieces < LEAST_EXAMPLES:
        raise UserError(f"A search compares on {LEAST_EXAMPLES} pieces of text at least, and {choice.text} gives "
                        f"{examples.pieces}; give a longer text, or more of it with --tokens.")
    general = batches_of(choice.general, tokenizer, choice.n_tokens)
    skeleton = source.skeleton_of(n)
    spec = model_spec(folder.name, skeleton, experts_modules(skeleton, folder.name))
    origin = (f"a specialist of {folder.resolve()}: {choice.way} by {choice.score}, {choice.rounds} rounds, over the "
              f"text {digest(examples.fitted)}")
    with FolderWriter.begin(dest, spec, len(skeleton.state_dict()), origin, source.manifest.group_size,
                            source.manifest.trunk_bits) as writer:
        mixture, losses = fitted(source, n, examples, general, choice, dest / SEARCHED, report, check)
        _experts(writer, source, mixture, report, check)
        _trunk(writer, source, mixture, skeleton)
        (dest / SEARCHED).unlink(missing_ok=True)
        return writer.seal(source.config_of(n), skeleton, folder, calibration={NOTE: _note(source, choice, losses)})


def kept_of(manifest: Manifest, keep: float) -> int:
    """How many experts stay of each layer. UserError where that is fewer than a token takes, or all."""
    n = round(keep * manifest.experts)
    if not manifest.top_k <= n < manifest.experts:
        raise UserError(f"Of {manifest.experts} experts a layer {n} would stay, and a token takes {manifest.top_k}; "
                        f"choose --keep between {manifest.top_k / manifest.experts:.2f} and "
                        f"{(manifest.experts - 1) / manifest.experts:.2f}.")
    return n


def fitted(source: Source, n: int, examples: Examples, general: Batches, choice: Choice, log: Path,
           report: Report = unheard, check: Callable[[], None] = lambda: None) -> tuple[Mixture, Losses]:
    """What a specialist of n experts a layer is made of, and what it loses. log: of an interrupted search."""
    report(said(f"Counting how {source.manifest.layers * source.manifest.experts:,} experts are used"))
    whole, model = Counting(source), MixedModel(source, n)
    loss(whole, examples.fitted, check)

    def score(mixture: Mixture) -> float:
        model.take(mixture)
        return loss(model, examples.fitted, check)
    mixture = _mixture(source, whole.usage(), n, choice, score, log, report)
    report(said("Measuring what it loses"))
    model.take(mixture)
    return mixture, Losses(*(math.exp(loss(each, texts, check)) for texts in (examples.held_out, general)
                             for each in (whole, model)))


def _mixture(source: Source, usage: Usage, n: int, choice: Choice, score: Callable[[Mixture], float], log: Path,
             report: Report) -> Mixture:
    experts, kept = source.manifest.experts, usage.best(n, choice.score)
    if choice.way == "mask":
        return masked(kept, experts)
    if choice.way == "merge":
        return merged(usage, kept, alike(source.rows()))
    begun = time.monotonic()

    def tell(done: int, rounds: int, least: float) -> None:
        left = (time.monotonic() - begun) / done * (rounds - done)
        report(Progress(done, rounds, 0.0, left, f"Round {done} of {rounds}: perplexity {math.exp(least):.3f}"))
    return search([kept, *(usage.best(n, name) for name in SCORES if name != choice.score)], experts, choice.rounds,
                  score, log, tell)


def _experts(writer: FolderWriter, source: Source, mixture: Mixture, report: Report, check: Callable[[], None]) -> None:
    for layer in range(source.manifest.layers):
        if experts_name(layer) not in writer.done:
            report(said(f"Writing layer {layer + 1} of {source.manifest.layers}"))
            writer.layer(layer, _blobs(writer, source, mixture, layer, check))


def _blobs(writer: FolderWriter, source: Source, mixture: Mixture, layer: int, check: Callable[[], None],
           ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    biases = {name: mixture.experts[layer] @ own for name, own in source.far.biases(layer).items()}
    for j in range(mixture.shape[1]):
        check()
        own = mixture.single(layer, j)
        if own is None:
            blob = expert_blob(*matrices_of(source, mixture, layer, j), writer.layout, check)
        else:
            source.far.verify(layer, own)
            blob = source.far.blobs(layer)[own, 0]
        yield blob, {name: rows[j:j + 1] for name, rows in biases.items()}


def _trunk(writer: FolderWriter, source: Source, mixture: Mixture, skeleton: torch.nn.Module) -> None:
    """As it is stored, but for the router's rows: those are chosen among, or mixed and coded anew."""
    if TRUNK in writer.done:
        return
    mixed = dict(routers_of(source, mixture))
    for name in skeleton.state_dict():
        parts = source.stored(name)
        if not parts or name in writer.trunk:
            continue
        if name in mixed:
            parts = _rows(name, parts, mixture.router[source.router[name]], mixed[name])
        writer.trunk.add(parts)
    writer.save()


def _rows(name: str, parts: dict[str, Tensor], router: Tensor, mixed: Tensor) -> dict[str, Tensor]:
    """A tensor of the router [n, ..] in the form that the folder has it in."""
    chosen = router.argmax(1)
    if torch.equal(router, torch.nn.functional.one_hot(chosen, router.shape[1]).float()):
        return {part: tensor[chosen].contiguous() for part, tensor in parts.items()}
    return encode(name, mixed if name + CODES in parts else mixed.to(parts[name].dtype), 8 if name + CODES in parts
                  else 16)


def _note(source: Source, choice: Choice, losses: Losses) -> dict:
    """What the manifest tells of it, and through it the card."""
    return {"of": source.folder.name, "experts": source.manifest.experts, "way": choice.way, "score": choice.score,
            "text": choice.text.name, "other_text": choice.general.name, "tokens": choice.n_tokens,
            "rounds": choice.rounds if choice.way == "search" else 0, **asdict(losses)}
