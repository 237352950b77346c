"""What reads a prompt through gated delta-nets: flash-linear-attention where it computes right on this card, everywhere
else transformers' own chunked form.

transformers takes the functions of `fla` and `causal_conv1d` wherever these packages can be imported, unasked: on cards
where they are wrong, and on processors, where they cannot run. Here all of them are transformers' own again whenever a
model with such nets opens, but for the one that has just been tried on that model's shapes. It costs nothing where none
is installed. Other mixers that take these packages' functions (convolutions of lfm2_moe, jamba, granitemoehybrid; kda)
are left as transformers has them.

Legend: T tokens, K heads of keys, V heads of values.
"""
from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from math import inf, isfinite, nan

import torch
from torch import nn

Tensor = torch.Tensor
Rule = Callable[..., tuple[Tensor, Tensor]]
CHUNKED = "torch_chunk_gated_delta_rule"    # as transformers' modules call it, whosever it is
PLACE, NAME = "fla.ops.gated_delta_rule", "chunk_gated_delta_rule"
TAKEN = {"fla": (CHUNKED, "torch_recurrent_gated_delta_rule"),
         "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update")}
N_TOKENS = 150  # more than two of their chunks of 64, the last one cut short
ALLOWED = 0.01  # root mean square of the difference over that of the numbers; 16-bit products give some 0.005

_log = logging.getLogger(__name__)


def choose_delta_rule(model: nn.Module, device: str) -> str:
    """For the prompts of this model, on "cpu" or "cuda" -> "", or a sentence that says why the package rests."""
    net = next((part for part in model.modules() if type(part).__name__.endswith("GatedDeltaNet")), None)
    names = vars(sys.modules[type(net).__module__]) if net else {}
    if CHUNKED not in names:
        return ""
    for package, taken in TAKEN.items():
        if _is_installed(package):
            names.update({name: inspect.unwrap(names[name]) for name in taken if name in names})
    if device == "cpu" or not _is_installed("fla"):
        return ""
    try:
        theirs = _adapted(getattr(import_module(PLACE), NAME), names[CHUNKED])
        off = _difference(theirs, names[CHUNKED], net)
    except Exception as error:  # of an import, a compiler or a card: many kinds
        return _rests(f"cannot be used: {type(error).__name__} {error}".splitlines()[0][:120])
    if not off <= ALLOWED:      # nor is what is no number
        return _rests(f"computes other numbers, {off:.1%} off" if isfinite(off) else "computes no such numbers")
    names[CHUNKED] = theirs
    _log.info("prompts go through flash-linear-attention, %.2f %% off in its trial", 100 * off)
    return ""


def _rests(why: str) -> str:
    return f"Prompts are read without the installed flash-linear-attention, which on this card {why}."


def _is_installed(package: str) -> bool:
    return package in sys.modules or find_spec(package) is not None


def _adapted(theirs: Rule, own: Rule) -> Rule:
    """Of what transformers hands over, the package gets what its version knows."""
    known = set(inspect.signature(theirs).parameters)

    @wraps(own)
    def rule(*args, **given):
        return theirs(*args, **{name: value for name, value in given.items() if name in known})
    return rule


@torch.no_grad()
def _difference(theirs: Rule, own: Rule, net: nn.Module) -> float:
    """The larger one of the outputs [1, T, V, D] and of the states behind them, from nothing and then from a state."""
    device, draw = net.A_log.device, torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(1, N_TOKENS, *shape, generator=draw).to(device)
    kind, keys, values = net.out_proj.weight.dtype, (net.num_k_heads, net.head_k_dim), (net.num_v_heads, net.head_v_dim)
    query, key, value, beta = (part.to(kind) for part in (
        drawn(*keys), drawn(*keys), drawn(*values), drawn(net.num_v_heads).sigmoid()))
    decay, state, found = -drawn(net.num_v_heads).exp() / 8, None, []
    for _ in range(2):
        made, expected = (rule(query, key, value, g=decay, beta=beta, initial_state=state, output_final_state=True,
                               use_qk_l2norm_in_kernel=True) for rule in (theirs, own))
        for one, other in zip(made, expected, strict=True):
            if one.shape != other.shape or one.dtype != other.dtype:
                return inf
            found.append(float((one.float() - other.float()).norm() / other.float().norm()))
        state = expected[1]
    return max(found) if all(one == one for one in found) else nan
