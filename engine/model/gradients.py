"""Gradients through routed experts: of their hidden states and of the router's weights, at levels `exact` and `full`.

The experts themselves are codes and do not learn. Backward decodes one expert at a time and computes it once more, so
that it takes the memory of one expert. A sparse level leaves neurons out by a rule that has no gradient: it is refused.
`felt` asks for the gradients of what the experts give: which of its errors an answer feels (Fisher's information).
"""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.core import SPARSE_LEVELS, UserError
from engine.experts.layer import LayerExperts
from engine.experts.runtime import Runtime


class Experts(torch.autograd.Function):
    """x [T, H], weights [T, k], ids [T, k] -> [T, H], in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, ids: Tensor, runtime: Runtime, layer: LayerExperts) -> Tensor:
        ctx.save_for_backward(x, weights, ids)
        ctx.of = runtime, layer, runtime.level
        return runtime.forward(layer, x, ids, weights)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        runtime, layer, level = ctx.of
        if level in SPARSE_LEVELS:
            raise UserError(f"There are no gradients at level {level}, which leaves out a part of every expert; run "
                            "the forward again at level exact: model.floe.set_level('exact').")
        x, weights, ids = ctx.saved_tensors
        of_x, of_weights = _gradients(*(t.float() for t in (grad, x, weights)), ids, runtime, layer)
        return of_x.to(x.dtype), of_weights.to(weights.dtype), None, None, None


def _gradients(grad: Tensor, x: Tensor, weights: Tensor, ids: Tensor, runtime: Runtime, layer: LayerExperts,
               ) -> tuple[Tensor, Tensor]:
    """grad, x [T, H], weights [T, k], all float32 -> gradients of x and of weights."""
    of_x, of_weights, far = torch.zeros_like(x), torch.zeros_like(weights), runtime.far
    gate_up, down = (torch.empty(rows, far.hidden, dtype=torch.float32) for rows in (2 * far.neurons, far.neurons))
    for expert in ids[ids >= 0].unique().tolist():
        far.decode(layer.index, expert, *layer.halves(gate_up), down)
        token, place = (ids == expert).nonzero(as_tuple=True)
        with torch.enable_grad():
            rows = x[token].requires_grad_()
            y = layer.whole(rows, gate_up.to(x.device), down.to(x.device), expert)
        of_weights[token, place] = (grad[token] * y).sum(1).detach()
        of_x.index_add_(0, token, torch.autograd.grad(y, rows, grad[token] * weights[token, place, None])[0])
    return of_x, of_weights


def felt(model: nn.Module, runtime: Runtime, documents: Iterable[Tensor], check: Callable[[], None]) -> Tensor:
    """float32 [L, H, H]: second moments a token of the gradient of the loss, of next tokens that the model itself
    draws, in what each layer's experts give. Half of their product with an error's both sides is what it costs in nats.

    documents: int64 [1, n] each; check: called before each of them, may raise. Memory: the result, one document's
    forward, one expert."""
    draw, given = torch.Generator().manual_seed(0), {}
    before, runtime.phase = runtime.phase, "prefill"
    sums, n_tokens = torch.zeros(runtime.far.layers, runtime.far.hidden, runtime.far.hidden), 0
    handles = [module.register_forward_hook(lambda module, _, out: given.update({module.layer.index: out}))
               for module in model.modules() if getattr(module, "runtime", None) is runtime]
    handles.append(model.get_input_embeddings().register_forward_hook(
        lambda module, _, out: out.detach().requires_grad_()))
    try:
        for ids in documents:
            check()
            with torch.inference_mode(False), torch.enable_grad():
                logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draw)[:, 0]
                loss = F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
                gradients = torch.autograd.grad(loss, [given[i] for i in range(len(sums))])
            for own, gradient in zip(sums, gradients, strict=True):
                rows = gradient.flatten(0, -2).float().cpu()
                own.addmm_(rows.T, rows)
            n_tokens += ids.numel()
    finally:
        runtime.phase = before
        for handle in handles:
            handle.remove()
    return sums.div_(max(1, n_tokens))
