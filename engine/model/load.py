"""Opening a model: a compressed folder, or an uncompressed checkpoint at level `full`, on the side that computes it.

The trunk of a checkpoint is read by engine/files/checkpoint.py. Hub kernels stay off: nothing that was downloaded is
executed.
"""
from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("USE_HUB_KERNELS", "NO")

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.core import ModelSpec, Options, UserError
from engine.disk import ordinary_files
from engine.experts.policy_hook import choose_policies
from engine.experts.runtime import Runtime
from engine.experts.store import NO_EXPERTS, Far, FarCheckpoint, FarTable, offered
from engine.files.chat_parts import VOCABULARIES
from engine.files.checkpoint import Checkpoint
from engine.files.config_json import read_config_json
from engine.files.manifest import TRUNK, Manifest, is_compressed
from engine.files.proof import proving
from engine.machine import detect, errors
from engine.machine.pinned_memory import CudaDriver
from engine.machine.process_memory import own_bytes, own_vram_bytes, return_freed
from engine.model.blocks import is_known
from engine.model.mixers.delta_rule import choose_delta_rule
from engine.model.packed import Packed, nest_head
from engine.model.placement import onto_gpu, prepare_processor, side_of, trunk_dtype
from engine.model.registration import Report, UnboundConfig, bind, blobs_of, level_plans, unbound
from engine.model.tokenizer_trial import what_is_wrong
from engine.one_thread import one_thread
from engine.planning import explain
from engine.planning.planner import Planner
from engine.policies.choice import parse, refusal

_log = logging.getLogger(__name__)
LOADED = 0.95  # share of opening that lies behind when the model is in its place


@dataclass
class Loaded:
    """An open model: transformers' model and tokenizer, the runtime behind its experts, its numbers, its plan."""

    model: nn.Module
    tokenizer: Any
    runtime: Runtime
    spec: ModelSpec
    planner: Planner
    memory_check: str = ""  # what was planned for opening it and what it took, in one sentence


def load(folder: str | Path, options: Options, progress: Report | None = None) -> Loaded:
    """Open a compressed folder or an uncompressed checkpoint (level `full`).

    UserError in one sentence for a folder that is neither, is damaged, or lacks its tokenizer. MachineError in one
    for a card that cannot be used.
    """
    folder, report = Path(folder), progress or (lambda text, share: None)
    check_folder(folder)
    loaded = None
    try:
        with proving(folder, report) as changed:
            loaded = _loaded(folder, options, report)
    except BaseException:
        if loaded:
            loaded.runtime.close()
        raise
    for sentence in changed:
        report(sentence, LOADED)
    loaded.runtime.reason = " ".join((loaded.runtime.reason, *changed)).strip()
    if loaded.memory_check:
        report(loaded.memory_check, LOADED)
    return loaded


def _loaded(folder: Path, options: Options, report: Report) -> Loaded:
    return_freed()  # of a model that was open before
    choice = parse(options.policies)
    no_card = options.device == "cpu" or torch.version.cuda is None
    found = detect.without_cards(folder) if no_card else detect.survey(folder, own_vram_bytes=own_vram_bytes())
    if not torch.cuda.is_initialized():
        detect.choose_card(found)
    device, why_not_the_card = errors.device_for(options.device)
    machine = detect.machine(found, device)
    if why := refusal(choice, options.level or "exact", device):
        raise UserError(why)
    report("Reading the tokenizer", 0.0)
    tokenizer = load_tokenizer(folder)
    if device == "cpu":
        why_slow = prepare_processor(report, 0.05)
    report("Reading the weights", 0.1)
    before, dtype = own_bytes(), trunk_dtype(device)
    with one_thread:
        if is_compressed(folder):
            model, far, planner = _load_compressed(folder, dtype)
        else:
            model, far, planner = _load_checkpoint(folder, dtype, report)
    report("Preparing near memory", 0.8)
    planner, levels = replace(planner, machine=machine), offered(far, level_plans(planner.calibration))
    level = _level(options, levels, planner)
    if options.level not in (None, level) and level != "full":
        report(f"Not calibrated for {options.level}: running at {level}", 0.9)
    if device == "cpu":
        runtime = bind(model, side_of(far), far, planner, level, planner.near_bytes(level, options), options.predict)
        runtime.reason = " ".join((why_not_the_card, why_slow)).strip()
        if is_known(model):     # others compute the whole head, and gain nothing
            nest_head(model)
    else:
        runtime = onto_gpu(model, far, folder, level, planner, options, report, CudaDriver())
    try:
        runtime.reason = f"{runtime.reason} {choose_delta_rule(model, device)}".strip()
        choose_policies(runtime, model, _policies(runtime, options))
    except BaseException:
        runtime.close()
        raise
    return_freed()
    taken = _taken_bytes(model, runtime, before)
    check = explain.compare(planner.plan(level, options), taken) if device == "cpu" else ""
    return Loaded(model.eval(), tokenizer, runtime, model.floe_spec, planner, check)


def _policies(runtime: Runtime, options: Options) -> str:
    """The wished ones; a table, which has none of what they are about, opens without."""
    if not options.policies or not isinstance(runtime.far, FarTable):
        return options.policies
    runtime.reason = f"{runtime.reason} {NO_EXPERTS}".strip()
    return ""


def _level(options: Options, levels: tuple[str, ...], planner: Planner) -> str:
    """The wished one where the folder offers it, else the plan's."""
    if options.level in levels or len(levels) == 1:
        return options.level if options.level in levels else levels[0]
    planned = planner.plan(None, options).level
    return planned if planned in levels else levels[0]


def _taken_bytes(model: nn.Module, runtime: Runtime, before: int) -> int:
    """What opening took of main memory. Rows of near memory that are still empty count: they are this model's. So do
    the trunk's codes, which lie where the file is mapped."""
    codes = sum(p.mapped_bytes for p in model.parameters() if isinstance(p, Packed))
    return codes + own_bytes() - before + runtime.near_bytes - runtime.near_used_bytes()


def _load_compressed(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Far, Planner]:
    """UserError where configuration and weights are not those of one model: transformers would make up the rest."""
    try:
        with unbound():
            model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False,
                                                                output_loading_info=True)
    except Exception as error:  # transformers raises many kinds for what does not go together
        if isinstance(error, UserError) or errors.is_out_of_memory(error):
            raise
        raise UserError(_unopened(folder, error)) from error
    if found["missing_keys"] or found["unexpected_keys"]:
        raise UserError(_damaged(folder))
    return model, *blobs_of(model)


def _damaged(folder: Path, why: str = "") -> str:
    return f"{folder} is damaged (config.json or {TRUNK} cannot be used{why}); download or compress the model again."


def _unopened(folder: Path, error: Exception) -> str:
    """What transformers' error means: weights that cannot be read or have other shapes, else nobody knows."""
    why = f": {type(error).__name__} {error}".replace(str(folder), folder.name).splitlines()[0][:100]
    if "size mismatch" in str(error) or "mismatched" in str(error):
        return _damaged(folder, " together: their shapes differ")
    if isinstance(error, SafetensorError):
        return _damaged(folder, why)
    _log.error("%s cannot be opened", folder, exc_info=error)
    logs = [Path(handler.baseFilename) for handler in logging.getLogger().handlers
            if isinstance(handler, logging.FileHandler)]
    more = f"stands in {logs[-1].parent.name}/{logs[-1].name}" if logs else "was written to the terminal"
    return f"{folder} cannot be opened, and the cause is unknown{why}; all that is known {more}."


def _load_checkpoint(folder: Path, dtype: torch.dtype, report: Report) -> tuple[nn.Module, Far, Planner]:
    checkpoint = Checkpoint.open(folder)
    if checkpoint.spec.table_bytes:
        raise UserError(f"{folder} is a Mixture of Lookup Experts in its training form; make its table first: "
                        "python -m engine compress FOLDER DEST")
    if checkpoint.warning:
        report(checkpoint.warning, 0.1)
    trunk = {name: tensor for name, tensor in checkpoint.trunk()}
    model = type(checkpoint.skeleton).from_pretrained(
        None, config=checkpoint.text_config, state_dict=trunk, dtype=dtype,
        quantization_config=UnboundConfig())
    return model, FarCheckpoint(checkpoint), Planner(model.floe_spec, model.floe_machine)


def check_folder(folder: Path) -> None:
    """What can be seen without reading weights. UserError for a folder that is missing, cut short or incomplete."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    ordinary_files(folder)
    if is_compressed(folder):
        Manifest.load(folder).check_sizes(folder)
    read_config_json(folder)
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json); download the model again.")


def load_tokenizer(folder: Path):
    """The folder's own tokenizer. UserError when it has none that works."""
    path, wrong = folder / "tokenizer.json", ""
    if path.is_file():
        with path.open("rb") as file:
            wrong = _tried(path, hashlib.file_digest(file, "sha256").digest())
    try:
        if not wrong:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:  # the tokenizers library raises bare exceptions, and panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        wrong = "it is damaged"
    raise UserError(f"{folder} has no usable tokenizer (tokenizer.json: {wrong}); download the model again.")


@lru_cache(16)
def _tried(path: Path, content: bytes) -> str:
    return what_is_wrong(path)
