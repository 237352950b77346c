"""Answers of a given form: a JSON schema says at every step which tokens may come next (llguidance does the work).

The mask is laid over the logits before anything else looks at them, so sampling goes on as it would. The host has to
see the logits at every step.
"""
from __future__ import annotations

import json

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from engine.core import MachineError, UserError
from engine.decode.decoder import Draw

MOST_CHARACTERS = 100_000  # of a schema
# Between two parts of a document a model that is unsure writes blanks until its limit.
FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}


def checked_schema(schema: object) -> str:
    """The schema as text. UserError for what is none, or what the grammar cannot express."""
    text = json.dumps(schema)
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"The JSON schema has {len(text):,} characters; shorten it to {MOST_CHARACTERS:,}.")
    try:
        wrong, said = LLMatcher.validate_grammar_with_warnings(_compiled(text))
    except (ValueError, RecursionError) as error:
        wrong, said = True, [str(error)]
    if wrong:
        raise UserError(f"The JSON schema cannot be kept to ({_brief(said)}); simplify it.")
    return text


class Grammars:
    """Of one model's vocabulary, which takes up to a second to prepare: once, when it is first needed."""

    def __init__(self, tokenizer, ends: frozenset[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._vocabulary: LLTokenizer | None = None

    def of(self, schema: str) -> Grammar:
        """UserError where this model's tokenizer or the schema is of a kind that cannot be constrained."""
        if self._vocabulary is None:
            try:
                self._vocabulary = from_tokenizer(self._tokenizer, eos_token=sorted(self._ends))
            except ValueError as error:
                raise UserError("This model's tokenizer cannot be held to a JSON schema; ask without one.") from error
        return Grammar(LLMatcher(self._vocabulary, _compiled(schema)))


class Grammar:
    """One answer's. active: False while the model is still thinking."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher, self.active = matcher, True
        self._check()

    @property
    def complete(self) -> bool:
        """Nothing may follow."""
        return self._matcher.is_stopped()

    def around(self, draw: Draw) -> Draw:
        """The same draw, of the tokens that may come next."""
        def within(logits: torch.Tensor, ids: list[int]) -> int:
            if not self.active:
                return draw(logits, ids)
            token = draw(logits.masked_fill(~self._allowed(len(logits)).to(logits.device), -torch.inf), ids)
            self._matcher.consume_token(token)
            self._check()
            return token
        return within

    def _allowed(self, n_logits: int) -> torch.Tensor:
        """bool [V]; a model may have more logits than its tokenizer has tokens."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.zeros(n_logits, dtype=torch.bool)
        known = torch.from_numpy(bits[:n_logits]).bool()
        allowed[:len(known)] = known
        self._check()
        return allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            why = _brief([self._matcher.get_error()])
            raise MachineError(f"The answer could not be held to its JSON schema ({why}); simplify it.")


def _brief(said: list[str]) -> str:
    return " ".join(" ".join(said).split())[:300].rstrip(".")


def _compiled(schema: str) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides=FORM)
