"""The other engine's side of the comparison: run by the Python of its own environment, which has nothing of ours.

Arguments: the file that was written, the file to make of it at Q4_K_M, threads, tokens of context, and whether weights
are brought into the order that this processor likes best (0 or 1). Then a line of JSON
on standard input for each run, {"prompt": [ids], "tokens": [ids]}, answered by a line of seconds.
"""
from __future__ import annotations

import ctypes
import json
import os
import sys
import time

Q4_K_M = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M
BATCH = 512


def main(source: str, made: str, threads: int, context: int, ordered: bool) -> None:
    silent = llama.llama_log_callback(_silent)  # lives as long as what calls it
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    if not os.path.exists(made):
        wishes = llama.llama_model_quantize_default_params()
        wishes.ftype, wishes.allow_requantize, wishes.nthread = Q4_K_M, True, threads
        assert llama.llama_model_quantize(source.encode(), made.encode(), ctypes.byref(wishes)) == 0, "not quantised"
    model_wishes = llama.llama_model_default_params()
    model_wishes.n_gpu_layers, model_wishes.use_extra_bufts = 0, ordered
    model = llama.llama_model_load_from_file(made.encode(), model_wishes)
    wishes = llama.llama_context_default_params()
    wishes.n_ctx, wishes.n_batch, wishes.n_ubatch = context, BATCH, BATCH
    wishes.n_threads = wishes.n_threads_batch = threads
    opened = llama.llama_init_from_model(model, wishes)
    print(json.dumps({"bytes": os.path.getsize(made)}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        llama.llama_memory_clear(llama.llama_get_memory(opened), True)
        start = time.perf_counter()
        for at in range(0, len(asked["prompt"]), BATCH):
            read(opened, asked["prompt"][at:at + BATCH])
        prefilled = time.perf_counter()
        for token in asked["tokens"]:
            read(opened, [token])
        print(json.dumps([prefilled - start, time.perf_counter() - prefilled]), flush=True)


def read(opened, ids: list[int]) -> None:
    tokens = (llama.llama_token * len(ids))(*ids)
    assert llama.llama_decode(opened, llama.llama_batch_get_one(tokens, len(ids))) == 0, "not decoded"
    llama.llama_get_logits_ith(opened, -1)[0]  # waits for it


def _silent(level, text, data) -> None:
    """It tells of every tensor."""


if __name__ == "__main__":
    import llama_cpp as llama  # only this environment has it; the module is looked at in ours as well

    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1")
