"""An open model onto a graphics card; where its experts cannot go there, the processor computes them and says so."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from engine.core import MachineError, Options
from engine.experts.device import DeviceRuntime, NoDevicePath
from engine.experts.full import FullRuntime
from engine.experts.runtime import Runtime
from engine.experts.store import Far, FarCheckpoint, FarLocked, FarTable
from engine.files.manifest import is_compressed
from engine.machine import errors
from engine.machine.pinned_memory import Driver, HostMemory
from engine.model.blocks import is_known
from engine.model.host_embedding import HostEmbedding, host_bytes, leave_on_host
from engine.model.lookup_runtime import LookupRuntime
from engine.model.packed import nest_head
from engine.model.registration import Report, bind, host_side_of
from engine.planning import explain
from engine.planning.plan import Plan
from engine.planning.planner import Planner
from engine.units import size
from kernels import dispatch

# Of the plan's parts those that a card gives only when the model reads and answers.
LATER = ("context memory (KV)", "recurrent and window state", "side jobs' context memory", "graph pool",
         "prefill workspace")


def trunk_dtype(device: str) -> torch.dtype:
    """float32 on the processor; 16 bits on a card: bfloat16, or float16 where it has no units for that (before 8.0)."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def prepare_processor(report: Report, share: float) -> str:
    """Compile what computes experts here, or load it -> "", or a sentence that says why it will be slow."""
    report("Preparing the processor (half a minute the first time)", share)
    return dispatch.compile_all()


def side_of(far: Far) -> type[Runtime]:
    """What computes these experts on the processor."""
    return FullRuntime if isinstance(far, FarCheckpoint) else host_side_of(far)


def onto_gpu(model: nn.Module, far: Far, folder: Path, level: str, planner: Planner, options: Options, report: Report,
             driver: Driver) -> Runtime:
    """Trunk and experts onto the card. MachineError with the plan's sum when they do not fit."""
    embedding = leave_on_host(model, driver)
    try:
        if is_known(model):
            nest_head(model)
        model.to("cuda")
        runtime = experts_on_gpu(model, far, folder, level, planner, options, report, driver)
    except BaseException as error:
        if embedding:
            embedding.close()
        if isinstance(error, torch.OutOfMemoryError):
            planned = explain.memory(planner.plan(level, options))
            raise MachineError(errors.in_words(error, planned)) from error
        raise
    if runtime.device == "cuda" and not isinstance(far, FarTable):     # of which nothing is near
        into_what_is_free(runtime, planner.plan(level, options), torch.cuda.mem_get_info()[0], report)
    runtime.memories += [embedding] if embedding else []
    runtime.link_bytes_per_second = planner.machine.link_bytes_per_second
    return runtime


def into_what_is_free(runtime: Runtime, plan: Plan, free_bytes: int, report: Report) -> None:
    """Once its slots are written, near memory gives back what the card lacks for the rest of the plan: a card counts
    some memory only when it is written, and other programs may have taken theirs meanwhile."""
    lacking = sum(n_bytes for part, n_bytes in plan.memory if part in LATER) - free_bytes
    if lacking <= 0:
        return
    runtime.set_level(runtime.level, max(runtime.smallest_bytes(), runtime.near_bytes - lacking))
    reason = (f"The card has {size(lacking)} less free than a moment ago; the model keeps so much less of itself "
              "there and is slower. Close other programs that use the card, then open the model again.")
    runtime.reason = " ".join((runtime.reason, reason)).strip()
    report(reason, 0.9)


def table_beside_gpu(model: nn.Module, far: FarTable, planner: Planner, level: str, near_bytes: int, driver: Driver,
                     device: str) -> Runtime:
    """Rows out of page-locked memory, read by the card; where the system locks no more, by the processor."""
    memory = HostMemory(host_bytes(far.table), driver)
    if memory.reason:
        memory.close()
        runtime = bind(model, LookupRuntime, far, planner, level, near_bytes)
        runtime.reason = f"{memory.reason} The processor reads the table for the card, which is slower."
        return runtime
    rows = HostEmbedding(far.table, memory)
    runtime = bind(model, LookupRuntime, far, planner, level, near_bytes, device=device, rows=rows)
    runtime.memories.append(memory)
    return runtime


def experts_on_gpu(model: nn.Module, far: Far, folder: Path, level: str, planner: Planner, options: Options,
                   report: Report, driver: Driver, device: str = "cuda") -> Runtime:
    """Page-lock the folder's experts and let the device compute them; where the card cannot compute such experts, the
    processor does, over `far`."""
    near_bytes = planner.near_bytes(level, options)
    if isinstance(far, FarTable):
        return table_beside_gpu(model, far, planner, level, near_bytes, driver, device)
    try:
        if not is_compressed(folder):
            raise NoDevicePath("An uncompressed checkpoint: the processor computes its experts, which is slow.")
        locked = FarLocked(folder, model.floe_manifest, driver,
                           lambda share: report("Reading the experts into page-locked memory", 0.8 + 0.1 * share))
        try:
            runtime = bind(model, DeviceRuntime, locked, planner, level, near_bytes, options.predict, device=device,
                           dtype=model.dtype)
        except BaseException:
            locked.close()
            raise
        runtime.reason = locked.reason(kept=not runtime.asks_the_host)
    except NoDevicePath as error:
        runtime = bind(model, side_of(far), far, planner, level, near_bytes, options.predict)
        runtime.reason = " ".join((str(error), prepare_processor(report, 0.9))).strip()
    if runtime.reason:
        report(runtime.reason, 0.9)
    return runtime
