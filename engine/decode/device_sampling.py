"""The next token on the device, without a wait: nothing is read back, every setting is a tensor.

Over the 256 best logits, exactly: what top-k leaves of up to 256 tokens, temperature, top-p, min-p and the repetition
penalty decide as transformers' own processors would, in their order. Settings that may keep more (no top-k, or a larger
one) run through those processors on the same stream instead. Draws invert the distribution at numbers drawn before the
answer began, one a token, so a seed gives the same answer on every path.
"""
from __future__ import annotations

import torch
from transformers import GenerationConfig

from engine.core import Sampling
from engine.decode.sampling import merged, n_best, processors

Tensor = torch.Tensor
BEST = 256


class DeviceSampler:
    """Draws for one answer after another over a vocabulary of V tokens; at most `longest` tokens an answer."""

    def __init__(self, vocabulary: int, longest: int, device: torch.device | str = "cpu") -> None:
        self.device, self.best = device, min(BEST, vocabulary)
        self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)  # tokens of prompt and answer
        self.uniform = torch.zeros(longest, device=device)
        self.n_drawn = torch.zeros(1, dtype=torch.int64, device=device)
        self.broken = torch.zeros((), dtype=torch.bool, device=device)        # a logit was not a number
        self.numbers = torch.zeros(5, device=device)  # temperature, top_k, 1 - top_p, min_p, repetition_penalty
        self.n_best = torch.zeros(1, dtype=torch.int64, device=device)        # how many logits decide; 0: all
        self.start(Sampling(), None, [])

    def start(self, sampling: Sampling, recommended: GenerationConfig | None, ids: list[int]) -> None:
        """Begin an answer behind the tokens `ids`. Writes into the same tensors; decides whether 256 logits do."""
        settings = merged(sampling, recommended)
        top_k = settings["top_k"] or len(self.seen)
        self.usual = settings["temperature"] == 0 or min(top_k, len(self.seen)) <= self.best
        self._processors = processors(settings | {"repetition_penalty": 1.0})  # that one needs a list; we have a map
        values = (settings["temperature"], min(top_k, self.best), 1 - settings["top_p"], settings["min_p"],
                  settings["repetition_penalty"])
        self.n_best.fill_(n_best(settings))
        self.numbers.copy_(torch.tensor(values, dtype=torch.float32))
        generator = torch.Generator()
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
        self.uniform.copy_(torch.rand(len(self.uniform), generator=generator))
        self.seen.zero_()
        if ids:
            self.seen[torch.tensor(ids, device=self.device)] = True
        self.n_drawn.zero_()
        self.broken.zero_()

    def draw(self, logits: Tensor) -> Tensor:
        """logits [V] -> the next token, int64 [1]; remembered for the penalty."""
        scores = logits.float()
        self.broken.logical_or_(scores.max().isfinite().logical_not())
        tokens, shares = self.distribution(scores) if self.usual else self._whole(scores)
        reached = shares.cumsum(0)
        at = self.uniform.index_select(0, self.n_drawn.clamp(max=len(self.uniform) - 1)) * reached[-1]
        rank = (reached <= at).sum(0, keepdim=True).clamp(max=len(tokens) - 1)
        token = tokens.index_select(0, rank)
        self.seen.index_fill_(0, token, True)
        self.n_drawn.add_(1)
        return token

    def distribution(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [V] -> tokens int64 [256], best first, and their probabilities."""
        temperature, top_k, tail, min_p, _ = self.numbers.unbind()
        best, tokens = self._punished(scores).topk(self.best)
        greedy = temperature == 0
        best = best / torch.where(greedy, 1.0, temperature)
        best = _only(best, best >= best.gather(0, torch.where(greedy, 0, top_k.long() - 1)[None]))
        shares = best.softmax(0)
        from_here_down = shares.flip(0).cumsum(0).flip(0)
        best = _only(best, from_here_down > tail)
        shares = best.softmax(0)
        best = _only(best, shares >= min_p * shares[:1])
        first = torch.arange(self.best, device=scores.device) == 0
        return tokens, torch.where(greedy, first.float(), best.softmax(0))

    def _whole(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The same over all V tokens, by transformers' processors; none of them waits for the device."""
        scores = self._processors(None, self._punished(scores)[None])[0]
        return torch.arange(len(scores), device=scores.device), scores.softmax(0)

    def _punished(self, scores: Tensor) -> Tensor:
        penalty = self.numbers[4]
        return torch.where(self.seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _only(scores: Tensor, kept: Tensor) -> Tensor:
    """-inf for what is not kept; the best score always is."""
    kept = torch.cat((torch.ones_like(kept[:1]), kept[1:]))
    return torch.where(kept, scores, -torch.inf)
