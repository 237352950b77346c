"""A trace of a model's own answers (engine/policies/trace.py): each prompt goes through the chat template and the
decode loop of the chat, and a hook writes down what the routers say.

A conversation of the file is asked turn by turn: the user's messages are the file's, the answers the model's own. What
near memory holds goes on from one answer to the next, as it does in a chat.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from engine.chat.turn import Turns
from engine.core import Sampling, UserError, never
from engine.experts.hook import Hook
from engine.experts.layer import LayerExperts
from engine.model.load import Loaded
from engine.policies.trace import RoutingTrace, RunNumbers
from engine.quality.texts import conversations
from kernels.select import DOWN_ONLY

Tensor = torch.Tensor
CHUNK = 256                           # tokens of a prompt that are read together
Report = Callable[[int, int], None]   # (answers written, tokens recorded)


class Recorder(Hook):
    """Writes down every layer's routing; `inner` acts behind it. Not for a recorded step: it waits for the device."""

    def __init__(self, loaded: Loaded, horizon: int = 1, inputs: bool = False, inner: Hook | None = None) -> None:
        """horizon: routers looked ahead, 0 or more. inputs: keep what every layer's experts were given."""
        self.runtime, self.horizon, self.keeps_inputs, self.inner = loaded.runtime, horizon, inputs, inner or Hook()
        self.answer, self._loaded = 0, loaded
        self._rows: dict[str, list] = {name: [] for name in ("token", "answer", "decode", "embedding")}
        self._layers = [{name: [] for name in ("logits", "ahead", "experts", "weights", "kept", "refined", "inputs")}
                        for _ in loaded.runtime.layers]
        if any(layer.router_weight is None for layer in loaded.runtime.layers):
            raise UserError("The routers of this model are not among those that this program knows, so there is "
                            "nothing to trace; use another model.")

    def watching(self):
        """Inside, the model's tokens are seen; beside `runtime.hooked(self)`."""
        return self._loaded.model.get_input_embeddings().register_forward_hook(self._read)

    def _read(self, module, given, embedded: Tensor) -> None:
        ids = given[0].flatten().tolist()
        self._rows["token"] += ids
        self._rows["answer"] += [self.answer] * len(ids)
        self._rows["decode"] += [self.runtime.phase == "decode"] * len(ids)
        self._rows["embedding"].append(_array(embedded.reshape(-1, embedded.shape[-1]), np.float16))

    @property
    def tokens(self) -> int:
        return len(self._rows["token"])

    def routed(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        at, layers, given = self._layers[layer.index], self.runtime.layers, x.float()
        ahead = torch.zeros(len(x), self.horizon, layer.router_weight.shape[0])
        for step, following in enumerate(layers[layer.index + 1:layer.index + 1 + self.horizon]):
            ahead[:, step] = given @ following.router_weight.T
        at["logits"].append(_array(given @ layer.router_weight.T, np.float32))
        at["ahead"].append(ahead.numpy())
        at["experts"].append(_array(ids, np.uint16))
        at["weights"].append(_array(weights, np.float32))
        at["inputs"].append(_array(x if self.keeps_inputs else x[:, :0], np.float16))
        if self.runtime.phase != "decode":
            self._note_neurons(layer, np.zeros((2, len(x), ids.shape[1] * self.runtime.far.neurons), bool))
        return self.inner.routed(layer, x, ids, weights)

    def token_ended(self) -> None:
        self.inner.token_ended()

    def keep_free(self, reserve: int) -> int:
        return self.inner.keep_free(reserve)

    def demanded(self, layer: int, ids: Tensor) -> None:
        self.inner.demanded(layer, ids)

    def stays_far(self, layer: int, ids: Tensor) -> Tensor | None:
        return self.inner.stays_far(layer, ids)

    def token_begins(self) -> None:
        self.inner.token_begins()

    def guess(self, layer: LayerExperts, x: Tensor) -> list[tuple[int, Tensor]] | None:
        return self.inner.guess(layer, x)

    def instead(self, layer: LayerExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        return self.inner.instead(layer, x, ids, weights)

    def added(self, layer: LayerExperts, x: Tensor, out: Tensor) -> Tensor:
        return self.inner.added(layer, x, out)

    def selected(self, layer: LayerExperts, ids: Tensor, weights: Tensor, neurons: Tensor, fidelity: Tensor,
                 ) -> tuple[Tensor, Tensor]:
        chosen = np.zeros((2, 1, ids.shape[1] * self.runtime.far.neurons), bool)
        there = neurons[0] >= 0
        chosen[0, 0, neurons[0][there].cpu().numpy()] = True
        chosen[1, 0, neurons[0][there & (fidelity[0] != DOWN_ONLY)].cpu().numpy()] = True
        self._note_neurons(layer, chosen)
        return self.inner.selected(layer, ids, weights, neurons, fidelity)

    def _note_neurons(self, layer: LayerExperts, chosen: np.ndarray) -> None:
        if self.runtime.is_sparse:
            for name, bits in zip(("kept", "refined"), np.packbits(chosen, axis=-1), strict=True):
                self._layers[layer.index][name].append(bits)

    def trace(self, model: str) -> RoutingTrace:
        """All that was seen. The layers of a forward that was broken off are left out."""
        n = min(sum(map(len, at["logits"])) for at in self._layers)
        found = {name: np.stack([_joined(at[name], n) for at in self._layers], 1) for name in self._layers[0]}
        tokens = {"token": np.array(self._rows["token"][:n], np.int32),
                  "answer": np.array(self._rows["answer"][:n], np.int32),
                  "decode": np.array(self._rows["decode"][:n], bool), "embedding": _joined(self._rows["embedding"], n)}
        if self.runtime.far.experts <= 256:
            found["experts"] = found["experts"].astype(np.uint8)
        return RoutingTrace(run_numbers(self._loaded, model), **tokens, **found)


def run_numbers(loaded: Loaded, model: str) -> RunNumbers:
    """What the simulator has to know of a runtime."""
    runtime, planner = loaded.runtime, loaded.planner
    far, layout = runtime.far, runtime.far.layout
    most = runtime.most_records() if runtime.is_sparse else [0] * far.layers
    plan = {"spec": asdict(loaded.spec), "trunk_bits": planner.trunk_bits, "group_size": planner.group_size,
            "calibration": dict(planner.calibration or {})}
    return RunNumbers(model, runtime.level, far.layers, far.experts, runtime.top_k, far.neurons, layout.blob_bytes,
                      layout.sketch_bytes, layout.record, layout.prefix, layout.padded, tuple(most), plan)


def record(loaded: Loaded, prompts: Path, recorder: Recorder, n_tokens: int, most_each: int = 256,
           report: Report = lambda answers, tokens: None) -> None:
    """Answers to the prompts of a file, until `n_tokens` tokens were written or the file ends; most_each: of an
    answer. UserError for a file without a question."""
    context = loaded.model.config.get_text_config().max_position_embeddings
    turns, runtime = Turns(loaded.model, loaded.tokenizer, loaded.runtime, context, CHUNK), loaded.runtime
    written, seed = 0, 0
    with closing(turns.tokens), runtime.hooked(recorder), recorder.watching(), torch.inference_mode():
        for asked in conversations(prompts):
            messages: list[dict] = []
            for question in asked:
                messages.append(question)
                if question["role"] != "user" or written >= n_tokens:
                    continue
                sampling, seed = Sampling(seed=seed, max_tokens=min(most_each, n_tokens - written)), seed + 1
                try:
                    events = list(turns.answer(messages, sampling, never))
                except UserError:  # longer than the context: the next conversation
                    break
                written += events[-1].n_tokens
                recorder.answer += 1
                messages.append({"role": "assistant", "content": "".join(e.text for e in events if e.kind == "answer")})
                report(recorder.answer, written)
            if written >= n_tokens:
                break
    if not written:
        raise UserError(f"{prompts} holds no question that fits; give conversations as .jsonl, or one prompt a line.")


def _array(values: Tensor, dtype: type) -> np.ndarray:
    return values.detach().cpu().float().numpy().astype(dtype) if dtype != np.uint16 else \
        values.detach().cpu().numpy().astype(dtype)


def _joined(parts: list[np.ndarray], n: int) -> np.ndarray:
    """Along the tokens, the first n of them; nothing recorded: n empty rows."""
    return np.concatenate(parts)[:n] if parts else np.zeros((n, 0), np.uint8)
