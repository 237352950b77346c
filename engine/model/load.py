"""Where Floe Chat meets transformers: registrations, the experts module without weights, and `load`.

After `import engine.hf`, `AutoModelForCausalLM.from_pretrained(folder)` opens a compressed folder like any other
checkpoint: the quantizer puts an experts module without parameters in place of each routed-experts module, decodes the
trunk, and binds the modules to far memory. An uncompressed checkpoint folder opens the same way through `load`, its
trunk read by engine/files/checkpoint.py. Hub kernels stay off: nothing that was downloaded is executed.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("USE_HUB_KERNELS", "NO")

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.core import MachineError, ModelSpec, Options, UserError
from engine.disk import ordinary_files
from engine.experts.host import LayerExperts, LevelPlan, Runtime
from engine.experts.store import Far, FarBlobs, FarCheckpoint
from engine.files.checkpoint import Checkpoint
from engine.files.manifest import TRUNK, Manifest, is_compressed
from engine.files.model_spec import read_config_json
from engine.files.proof import proving
from engine.files.skeleton import experts_modules, model_spec
from engine.files.trunk import CODES, SCALES, decode
from engine.machine import detect, errors, failures
from engine.machine.detect import machine_for
from engine.machine.pinned_memory import CudaDriver, Driver
from engine.machine.process_memory import own_bytes, own_vram_bytes, return_freed
from engine.model.host_embedding import leave_on_host
from engine.model.placement import experts_on_card
from engine.model.tokenizer_trial import what_is_wrong
from engine.planning import explain
from engine.planning.planner import Planner

Tensor = torch.Tensor
SIZES = ("layers", "experts", "top_k", "neurons", "hidden")  # what the manifest repeats of the configuration
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
Report = Callable[[str, float], None]  # (what is being done, share done 0..1)


def floe_experts(module: FloeExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts interface: hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
    return module.runtime.forward(module.layer, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS["floe"] = floe_experts


class FloeExperts(nn.Module):
    """Stands where a routed-experts module stood; its weights are in far and near memory.

    `origin` is the module it replaced, on the meta device: kept for its activation and its flags, not registered.
    """

    def __init__(self, origin: nn.Module) -> None:
        super().__init__()
        self.__dict__["origin"] = origin
        self.num_experts = origin.down_proj.shape[0]
        if getattr(origin, "has_post_expert_norm", False):
            self.post_expert_norm = origin.post_expert_norm

    def bind(self, index: int, runtime: Runtime, router_weight: Tensor | None) -> None:
        self.runtime = runtime
        self.layer = LayerExperts(index, not self.origin.is_concatenated, self.origin._apply_gate,
                                  runtime.far.biases(index), getattr(self, "post_expert_norm", None), router_weight)
        runtime.layers.append(self.layer)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return ALL_EXPERTS_FUNCTIONS["floe"](self, hidden_states, top_k_index, top_k_weights)


@register_quantization_config("floe")
class FloeConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed folder."""

    binds = True  # its experts, behind the weights

    def __init__(self, group_size: int = 128, trunk_bits: int = 16, **_: Any) -> None:
        self.quant_method = "floe"
        self.group_size, self.trunk_bits = group_size, trunk_bits


class UnboundConfig(FloeConfig):
    """For models whose experts the caller binds. No file can ask for it."""

    binds = False


class DecodeTrunk(ConversionOps):
    """`name:codes` and `name:scales` to the weight `name`."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # tells transformers not to cast what it hands over

    def convert(self, input_dict: dict, full_layer_name: str | None = None, model=None, **kwargs) -> dict:
        codes, scales = (input_dict[key][0] if isinstance(input_dict[key], list) else input_dict[key]
                         for key in (CODES, SCALES))
        return {full_layer_name: decode(codes, scales).to(model.get_parameter(full_layer_name).dtype)}


@register_quantizer("floe")
class FloeQuantizer(HfQuantizer):
    """Empty experts before the weights are loaded, far memory behind them afterwards."""

    def is_serializable(self, *_: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        """The trunk is stored under the model's own names: of all conversions only ours applies."""
        return [WeightConverter([CODES, SCALES], [""], [DecodeTrunk(self)])]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        name = Path(str(model.config.name_or_path or type(model).__name__)).name
        model.floe_machine = machine_for("cpu", Path.cwd())  # its memory before the weights take theirs
        experts = experts_modules(model, name)
        model.floe_spec = model_spec(name, model.config, model, experts)
        if self.quantization_config.binds:
            self.manifest = _manifest_of(model)
        for path, module in experts.items():
            model.set_submodule(path, FloeExperts(module))
        model.set_experts_implementation("floe")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.quantization_config.binds:
            return
        folder, manifest = Path(model.config.name_or_path), self.manifest
        room = Planner(model.floe_spec, model.floe_machine, manifest.trunk_bits, manifest.group_size,
                       manifest.calibration)
        with proving(folder):
            bind(model, FarBlobs(folder, manifest), "exact", room)


def _manifest_of(model: nn.Module) -> Manifest:
    """The manifest of the folder that a model without weights comes from. UserError where they are of different
    models: transformers would make up what is missing, however large."""
    folder, spec = Path(model.config.name_or_path), model.floe_spec
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder on this machine; download the model first.")
    manifest = Manifest.load(folder)
    trunk_bytes = next(entry.bytes for entry in manifest.files if entry.path == TRUNK)
    if spec.trunk_params > 2 * trunk_bytes or any(getattr(manifest, name) != getattr(spec, name) for name in SIZES):
        raise UserError(f"{folder} is damaged (config.json and floe.json are of different models); download or "
                        "compress the model again.")
    return manifest


def level_plans(calibration: dict) -> dict[str, LevelPlan]:
    """The levels that a folder's calibration offers."""
    def rows(found: dict, key: str) -> tuple:
        return tuple(tuple(row) for row in found.get(key, ()))
    return {level: LevelPlan(rows(found, "budgets"), rows(found, "thresholds"))
            for level, found in calibration.get("levels", {}).items() if "budgets" in found or "thresholds" in found}


def bind(model: nn.Module, far: Far, level: str, room: Planner) -> Runtime:
    """Connect every FloeExperts module of the model, in order of depth, to one runtime over `far`."""
    runtime = Runtime(far, room.spec.top_k, level, level_plans(room.calibration), room.near_bytes(level),
                      str(model.device))
    places = [(path, module) for path, module in model.named_modules() if isinstance(module, FloeExperts)]
    for index, (path, module) in enumerate(places):
        parent = model.get_submodule(path.rpartition(".")[0])
        module.bind(index, runtime, _router_weight(parent, (far.experts, far.hidden)))
    model.floe, model.floe_room = runtime, room
    return runtime


def _router_weight(block: nn.Module, shape: tuple[int, int]) -> Tensor | None:
    """The router's matrix [E, H] beside the experts, whatever the architecture calls it."""
    return next((p.detach() for name, p in block.named_parameters()
                 if tuple(p.shape) == shape and not name.startswith("experts.")), None)


@dataclass
class Loaded:
    """An open model: transformers' model and tokenizer, the runtime behind its experts, its numbers, its plan."""

    model: nn.Module
    tokenizer: Any
    runtime: Runtime
    spec: ModelSpec
    room: Planner
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
        report(sentence, 1.0)
    loaded.runtime.note = " ".join((loaded.runtime.note, *changed)).strip()
    report(f"Ready. {loaded.memory_check}", 1.0)
    return loaded


def _loaded(folder: Path, options: Options, report: Report) -> Loaded:
    return_freed()  # of a model that was open before
    no_card = options.device == "cpu" or torch.version.cuda is None
    found = detect.without_cards(folder) if no_card else detect.survey(folder, own_vram_bytes=own_vram_bytes())
    if not torch.cuda.is_initialized():
        detect.choose_card(found)
    device, why_not_the_card = errors.device_for(options.device)
    machine = detect.machine(found, device)
    report("Reading the tokenizer", 0.0)
    tokenizer = load_tokenizer(folder)
    report("Reading the weights", 0.1)
    before, dtype = own_bytes(), trunk_dtype(device)
    model = _load_compressed(folder, dtype) if is_compressed(folder) else _load_checkpoint(folder, dtype)
    report("Preparing near memory", 0.8)
    runtime, room = model.floe, replace(model.floe_room, machine=machine)
    runtime.predict = options.predict
    level = usable_level(options.level, runtime)
    if level not in (options.level, "full"):
        report(f"Not calibrated for {options.level}: running at {level}", 0.9)
    if device == "cpu":
        runtime.note = why_not_the_card
        runtime.set_level(level, room.near_bytes(level, options))
    else:
        runtime = _onto_card(model, folder, level, room, options, report, CudaDriver())
    return_freed()
    check = explain.compare(room.plan(level, options), _taken_bytes(runtime, before)) if device == "cpu" else ""
    return Loaded(model.eval(), tokenizer, runtime, model.floe_spec, room, check)


def trunk_dtype(device: str) -> torch.dtype:
    """float32 on the processor; 16 bits on a card: bfloat16, or float16 where it has no units for that (before 8.0)."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def _onto_card(model: nn.Module, folder: Path, level: str, room: Planner, options: Options, report: Report,
               driver: Driver) -> Runtime:
    """Trunk and experts onto the card. MachineError with the plan's sum when they do not fit."""
    embedding = leave_on_host(model, driver)
    try:
        model.to("cuda")
        runtime = experts_on_card(model, folder, level, room.near_bytes(level, options), report, driver)
    except BaseException as error:
        if embedding:
            embedding.close()
        if isinstance(error, torch.OutOfMemoryError):
            planned = explain.memory(room.plan(level, options))
            raise MachineError(errors.in_words(error, planned)) from error
        raise
    runtime.memories = [embedding] if embedding else []
    runtime.link_bytes_per_second = room.machine.link_bytes_per_second
    return runtime


def _taken_bytes(runtime: Runtime, before: int) -> int:
    """What opening took of main memory. Rows of near memory that are still empty count: they are this model's."""
    return own_bytes() - before + runtime.near_bytes - runtime.near_used_bytes()


def _load_compressed(folder: Path, dtype: torch.dtype) -> nn.Module:
    """UserError where configuration and weights are not those of one model: transformers would make up the rest."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False,
                                                            output_loading_info=True)
    except Exception as error:  # transformers raises many kinds for what does not go together
        if isinstance(error, UserError) or failures.is_out_of_memory(error):
            raise
        raise UserError(_damaged(folder)) from error
    if found["missing_keys"] or found["unexpected_keys"]:
        raise UserError(_damaged(folder))
    return model


def _damaged(folder: Path) -> str:
    return f"{folder} is damaged (config.json or {TRUNK} cannot be used); download or compress the model again."


def _load_checkpoint(folder: Path, dtype: torch.dtype) -> nn.Module:
    checkpoint = Checkpoint.open(folder)
    trunk = {name: tensor for name, tensor in checkpoint.trunk()}
    config = checkpoint.text_config
    model = type(checkpoint.skeleton).from_pretrained(
        None, config=config, state_dict=trunk, dtype=dtype, quantization_config=UnboundConfig())
    bind(model, FarCheckpoint(checkpoint), "full", Planner(model.floe_spec, model.floe_machine))
    return model


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


def usable_level(wish: str, runtime: Runtime) -> str:
    """The wished level where the folder offers it, else the best one that it has."""
    return wish if wish in runtime.levels else runtime.levels[0]
