"""Bytes: what each part of a model takes on disk, in video memory and in main memory, and the defaults behind it."""
from __future__ import annotations

from engine.core import ModelSpec
from kernels.layout import Layout

DEFAULT_CONTEXT = 8192
SIDE_CONTEXT = 512  # tokens of a job beside the conversation, which has a cache of its own: a title
DEFAULT_CHUNK = {"cuda": 2048, "cpu": 128}
DEFAULT_TRUNK_BITS = {"cuda": 4, "cpu": 8}
MIB = 2**20
# Compute capability from which Triton's products use a card's matrix units (3.7 makes those of 7.5 of additions).
PACKED_FROM = (8, 0)
# Video memory besides weights, cache and slots.
GRAPH_POOL_BYTES = 150 * 10**6
TILE_BYTES = 64 * MIB                  # at most, of packed experts on their way in during prefill; two are under way
FRAGMENTATION_BYTES = 200 * 10**6
PAIRS_BYTES = 2**30                    # at most, of what attention takes for each pair of tokens while a prompt is read
NESTED_FROM = 32 * MIB                 # of a head's 8-bit codes; half of fewer is soon read, or cached
SLOT_TABLE_BYTES = 20                  # of a slot of near memory: five numbers (kernels/pool.py)
# Main memory besides the experts: Python, torch, transformers, the tokenizer, one tensor being read.
PROCESS_BYTES = {"cuda": 2 * 10**9, "cpu": 10**9}
# Of a weight that transformers' own layers hold as a number: a trunk of 16 bits, and of any other the routers.
WEIGHT_BYTES = {"cuda": 2, "cpu": 4}


# --- sizes ----------------------------------------------------------------------------------------------------
def trunk_bytes(model: ModelSpec, bits: int) -> tuple[int, int]:
    """(embedding, everything else of the trunk) in bytes as stored: 8-bit weights cost 8.25 with their scales, 4-bit
    ones 4.5, and with 4 bits the embedding, the head and the first and last layer stay at 8."""
    head = model.vocabulary * model.hidden
    rest = max(0, model.trunk_params - model.embedding_params - head)
    eight, four = 8.25 / 8, 4.5 / 8
    if bits == 16:
        return 2 * model.embedding_params, 2 * (head + rest)
    if bits == 8:
        return int(eight * model.embedding_params), int(eight * (head + rest))
    edges = min(1.0, 2 / model.decoder_layers)
    return int(eight * model.embedding_params), int(eight * head + (eight * edges + four * (1 - edges)) * rest)


def near_trunk_bytes(model: ModelSpec, bits: int, device: str) -> tuple[int, int]:
    """(embedding, everything else of the trunk) in bytes while it runs; a token reads the second. 8 and 4 bits stay in
    their codes, but for the routers."""
    each, head_and_rest = WEIGHT_BYTES[device], model.trunk_params - model.embedding_params
    if bits == 16:
        return each * model.embedding_params, each * head_and_rest
    embedding, rest = trunk_bytes(model, bits)
    routers = model.layers * (model.experts + model.identities) * model.hidden
    return embedding, rest + int((each - rest / head_and_rest) * routers)


def far_bytes(model: ModelSpec, layout: Layout, level: str) -> int:
    """All experts as they lie far, or the table in place of them."""
    return model.table_bytes or model.n_experts_total * expert_bytes(model, layout, level)


def expert_bytes(model: ModelSpec, layout: Layout, level: str) -> int:
    """One whole expert as it lies far: the blob, or 16-bit weights at `full`; of a table what a token reads of it."""
    if model.table_bytes:
        return model.token_table_bytes // model.n_experts_total
    return 2 * model.expert_params if level == "full" else layout.blob_bytes


def tile_experts(experts: int, blob_bytes: int) -> int:
    """Experts of one staging tile: as many of a layer's as TILE_BYTES hold, one at least."""
    return min(experts, max(1, TILE_BYTES // blob_bytes))


def planned_chunk(model: ModelSpec, device: str, context: int) -> int:
    """Tokens of a prompt that are read at once: on a card no more than attention has room for."""
    chunk = min(DEFAULT_CHUNK[device], context)
    pair_bytes = max((pair for _, _, pair in model.prefill), default=0) if device == "cuda" else 0
    while chunk > 1 and chunk * context * pair_bytes > PAIRS_BYTES:
        chunk //= 2
    return chunk


def staging_bytes(model: ModelSpec, layout: Layout, capability: tuple[int, ...]) -> int:
    """On a card: two tiles of packed experts on their way in, and where they cannot be multiplied as they are, the
    16-bit matrices that one is decoded into. Of a table nothing."""
    if model.table_bytes:
        return 0
    decoded = model.expert_params if capability < PACKED_FROM else 0
    return tile_experts(model.experts, layout.blob_bytes) * 2 * (layout.blob_bytes + decoded)


def prefill_bytes(model: ModelSpec, chunk: int, context: int) -> int:
    """On a card: what a layer takes of a chunk, its mixer or its experts, whichever is more."""
    mixer = max((chunk * each + context * kept + chunk * context * pair for each, kept, pair in model.prefill),
                default=0)
    experts = 2 * chunk * (8 * model.hidden + model.top_k * (2 * model.hidden + 3 * model.neurons))
    return max(mixer, experts) + chunk * model.token_table_bytes


def side_bytes(model: ModelSpec, context: int) -> int:
    """The whole 16-bit cache of a job beside the conversation."""
    return model.kv_bytes_per_token * min(SIDE_CONTEXT, context) + model.state_bytes_at(
        min(SIDE_CONTEXT, context))


def router_copy_bytes(model: ModelSpec) -> int:
    """On a card: the routers in float32, beside those of the trunk, which look-ahead reads."""
    return 4 * model.layers * model.experts * model.hidden


def table_bytes(model: ModelSpec, level: str) -> int:
    """On a card, of what may be near: where each object lies."""
    return 4 * model.n_experts_total * (1 if level in ("exact", "full") else 1 + model.neurons)
