"""Who will be needed: predictors give every expert of a layer a score before its router has spoken. What they say is
only fetched ahead, so they never change an output.

Two kinds. Those of a token know only what came before it and speak for all layers at once, before layer 0; those of a
layer also know what this token's earlier layers were given. Tensors in, tensors out, state changed in place, so that a
recorded step can hold them. What has to learn first is in engine/policies/learned.py.

Legend: L layers, E experts, k routed, h layers looked ahead, H hidden.
"""
from __future__ import annotations

import torch

Tensor = torch.Tensor
HALF_LIFE = 32      # tokens after which a use counts half
MAPS = 1000         # maps that FineMoE keeps
DISTANCE = 2        # layers: how far ahead of the layer that is known a map speaks


class Predictor:
    """All hooks of a predictor; this one says nothing. horizon: routers that it wants to hear ahead of their layer.
    reads: of "embedding", "logits" and "input" (x) what it wants to be told; the others may be anything."""

    horizon = 0
    reads: frozenset[str] = frozenset()

    def start(self) -> None:
        """An answer begins."""

    def begin(self, embedding: Tensor) -> Tensor | None:
        """A token begins, embedded as [H] -> scores [L, E] for its layers, larger is likelier, or None."""
        return None

    def layer(self, at: int, ahead: Tensor, logits: Tensor, x: Tensor) -> tuple[int, Tensor] | None:
        """Layer `at` was reached: logits [E] of its router, ahead [h, E] of the routers behind it, x [H] what it is
        given -> (a later layer, scores [E]), or None."""
        return None

    def end(self, experts: Tensor, logits: Tensor) -> None:
        """A token has ended: experts int64 [L, k] that it was routed to, -1 for what has no weights (an identity, or
        what a route left out), logits [L, E]."""


def _add(scores: Tensor, experts: Tensor) -> None:
    """One more of each that was taken; scores [L, E], experts [L, k]."""
    scores.scatter_add_(1, experts.clamp(min=0), (experts >= 0).float())


class Repeat(Predictor):
    """What the last token took it takes again."""

    reads = frozenset({"logits"})

    def __init__(self, layers: int, experts: int) -> None:
        self.scores = torch.zeros(layers, experts)

    def begin(self, embedding: Tensor) -> Tensor:
        return self.scores

    def end(self, experts: Tensor, logits: Tensor) -> None:
        _add(self.scores.zero_(), experts)
        self.scores.add_(1e-3 * logits.softmax(-1))  # behind the k that it took, those it nearly took


class Popularity(Predictor):
    """How often each expert was taken; half_life 0: of all tokens alike, and the same whatever is read meanwhile."""

    def __init__(self, layers: int, experts: int, half_life: float = HALF_LIFE) -> None:
        self.scores, self._kept = torch.zeros(layers, experts), 0.5 ** (1 / half_life) if half_life else 1.0

    def begin(self, embedding: Tensor) -> Tensor:
        return self.scores

    def end(self, experts: Tensor, logits: Tensor) -> None:
        _add(self.scores.mul_(self._kept), experts)


class NextRouter(Predictor):
    """The router of the layer `horizon` on, on this layer's input (Fate, AdapMoE, HOBBIT, DAOP). horizon 0 is the
    layer's own router, which is always right: the control of the harness."""

    def __init__(self, layers: int, horizon: int = 1) -> None:
        self.layers, self.horizon = layers, horizon
        self.reads = frozenset() if horizon else frozenset({"logits"})

    def layer(self, at: int, ahead: Tensor, logits: Tensor, x: Tensor) -> tuple[int, Tensor] | None:
        if at + self.horizon >= self.layers:
            return None
        return at + self.horizon, ahead[self.horizon - 1] if self.horizon else logits


class Profile(Predictor):
    """The conversation's own usage (eMoE, arXiv 2503.06823), recomputed every `turns` answers: what was taken since
    it began. A new conversation begins with everybody's."""

    def __init__(self, layers: int, experts: int, turns: int = 1) -> None:
        self.scores, self.counts, self.turns, self._answers = (
            torch.zeros(layers, experts), torch.zeros(layers, experts), turns, 0)

    def start(self) -> None:
        if self._answers % self.turns == 0:
            self.scores.copy_(self.counts)
        self._answers += 1

    def begin(self, embedding: Tensor) -> Tensor:
        return self.scores

    def end(self, experts: Tensor, logits: Tensor) -> None:
        _add(self.counts, experts)


class ExpertMaps(Predictor):
    """The nearest of the stored expert maps, a token's router probabilities [L, E] (fMoE/FineMoE, arXiv 2502.05370).
    The first layers by the nearest embedding; the others by the nearest beginning of a map, `DISTANCE` layers behind.
    The map that is most like a newer one makes room for it. expected [L * E]: the probabilities last named."""

    reads = frozenset({"embedding", "logits"})

    def __init__(self, layers: int, experts: int, hidden: int, semantic: bool = True, trajectory: bool = True) -> None:
        self.maps = torch.zeros(MAPS, layers, experts)
        self.embeddings = torch.zeros(MAPS, hidden)
        self.n, self.semantic, self.trajectory = 0, semantic, trajectory
        self.expected = torch.ones(layers * experts)
        self._dots, self._squares = torch.zeros(MAPS), torch.zeros(MAPS)
        self._norms = torch.zeros(MAPS, layers)
        self._seen, self._layers = torch.zeros((), dtype=torch.float32), layers
        self._embedding = torch.zeros(hidden)

    def begin(self, embedding: Tensor) -> Tensor | None:
        self._embedding = _unit(embedding.float())
        for table in (self._dots, self._squares, self._seen):
            table.zero_()
        if not self.n or not self.semantic:
            return None
        found = self.maps[(self.embeddings[:self.n] @ self._embedding).argmax()]
        self.expected.copy_(found.flatten())
        return found

    def layer(self, at: int, ahead: Tensor, logits: Tensor, x: Tensor) -> tuple[int, Tensor] | None:
        if not self.trajectory:
            return None
        here, maps = logits.softmax(-1), self.maps[:max(1, self.n), at]
        self._dots[:len(maps)] += maps @ here
        self._squares[:len(maps)] += self._norms[:len(maps), at]
        self._seen += here.square().sum()
        target = at + DISTANCE
        if not self.n or target >= self._layers:
            return None
        likeness = self._dots[:self.n] / (self._squares[:self.n] * self._seen).sqrt().clamp_min(1e-9)
        found = self.maps[likeness.argmax(), target]
        self.expected.view(self._layers, -1)[target] = found
        return target, found

    def end(self, experts: Tensor, logits: Tensor) -> None:
        found, at = logits.softmax(-1), self.n
        if self.n == len(self.maps):  # the most redundant goes: nearest to what comes, by both likenesses
            flat = self.maps.flatten(1)
            near = (flat @ found.flatten()) / (flat.norm(dim=1) * found.norm()).clamp_min(1e-9)
            share = DISTANCE / self._layers
            at = int((share * (self.embeddings @ self._embedding) + (1 - share) * near).argmax())
        self.maps[at], self.embeddings[at], self._norms[at] = found, self._embedding, found.square().sum(-1)
        self.n = max(self.n, at + 1)


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp_min(1e-9)


class Payoff:
    """Whether fetching ahead pays, from what it fetched and what of that left unused: below `LEAST` useful it rests for
    `REST` tokens, then it is tried again. Asked once a token."""

    LEAST, LOOK, REST = 0.6, 64, 256

    def __init__(self) -> None:
        self.on, self.rests, self._tokens, self._speculative, self._wasted = True, 0, 0, 0, 0

    def pays(self, speculative: int, wasted: int) -> bool:
        """speculative, wasted: bytes so far."""
        self._tokens += 1
        if self._tokens >= (self.LOOK if self.on else self.REST):
            fetched, useless = speculative - self._speculative, wasted - self._wasted
            self.on = not self.on or useless <= (1 - self.LEAST) * fetched
            self.rests += not self.on
            self._tokens, self._speculative, self._wasted = 0, speculative, wasted
        return self.on


class Guesses:
    """A predictor at work: what it would fetch, and how much of what came it had named. The same for a replayed trace
    and a running model. named [L, 3k]: how often the first, second, .. of its guesses came; asked [L]: how many experts
    came where it had guessed."""

    def __init__(self, predictor: Predictor, layers: int, experts: int, top_k: int) -> None:
        self.predictor, self.layers, self.top_k = predictor, layers, top_k
        self.width = min(3 * top_k, experts)
        self.named, self.asked = torch.zeros(layers, self.width), torch.zeros(layers)
        self._ranked: dict[int, Tensor] = {}  # of the token under way
        self._of_token: Tensor | None = None
        self._nothing = torch.full((self.width,), -1, dtype=torch.int64)

    def begin(self, embedding: Tensor) -> list[tuple[int, Tensor]]:
        """A token begins -> (layer, ids int64 [k]) that may be fetched now."""
        scores = self.predictor.begin(embedding)
        self._ranked = {}
        self._of_token = None if scores is None else scores.topk(self.width, dim=1).indices
        return self._due(0)

    def at(self, layer: int, ahead: Tensor, logits: Tensor, x: Tensor) -> list[tuple[int, Tensor]]:
        """Behind what `layer` demands -> (a later layer, ids int64 [k])."""
        found = self.predictor.layer(layer, ahead, logits, x)
        fetch = []
        if found is not None:
            target, scores = found
            self._ranked[target] = scores.topk(self.width).indices
            if target > layer:
                fetch.append((target, self._ranked[target][:self.top_k]))
        return fetch + self._due(layer + 1)

    def _due(self, target: int) -> list[tuple[int, Tensor]]:
        """What was guessed for a layer when the token began, unless something better is known."""
        if self._of_token is None or target in self._ranked or target >= self.layers:
            return []
        self._ranked[target] = self._of_token[target]
        return [(target, self._ranked[target][:self.top_k])]

    def end(self, experts: Tensor, logits: Tensor) -> None:
        """A token has ended: experts int64 [L, k] that came, -1 for none, logits [L, E]."""
        guessed = torch.stack([self._ranked.get(layer, self._nothing) for layer in range(self.layers)])
        came = torch.where(experts < 0, -2, experts)    # which nobody guesses
        self.named.add_((guessed[:, :, None] == came[:, None]).any(2))
        self.asked.add_((guessed[:, 0] >= 0) * (experts >= 0).sum(1))
        self.predictor.end(experts, logits)

    def recall(self, times: int = 1) -> list[float]:
        """Per layer the share of what came that was among the times * k likeliest; 0 where nothing was guessed."""
        named = self.named[:, :times * self.top_k].sum(1)
        return (named / self.asked.clamp_min(1)).tolist()
