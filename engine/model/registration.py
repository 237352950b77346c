"""Where Floe Chat meets transformers: registrations, the experts module without weights, the runtime behind it.

After `import engine.hf`, `AutoModelForCausalLM.from_pretrained(folder)` opens a compressed folder like any other
checkpoint. Without it the folder's `experts_implementation`, whose name says what is missing, is one that transformers
does not know, and it refuses to open the folder. The quantizer puts an experts module without parameters in place of
each routed-experts module, leaves the trunk's matrices in their codes (engine/model/packed.py), and binds the modules
to far memory, computed by the processor. engine/model/load.py asks it not to, and binds them itself when it knows
where they are to be computed.
"""
from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.core import UserError
from engine.disk import check_room, trouble, writing
from engine.experts.host import HostRuntime
from engine.experts.layer import LayerExperts, LevelPlan
from engine.experts.runtime import Runtime
from engine.experts.store import Far, FarBlobs, FarTable
from engine.files.lookup.modeling import LookupExperts
from engine.files.manifest import EXPERTS, MANIFEST, TRUNK, Manifest
from engine.files.proof import proving
from engine.files.skeleton import experts_modules, model_spec
from engine.files.trunk import CODES, SCALES
from engine.machine.detect import machine_for
from engine.model.gradients import Experts
from engine.model.lookup_runtime import LookupRuntime, TableLayer
from engine.model.packed import packed_parameter
from engine.model.windows import Windows
from engine.planning.planner import Planner
from kernels.trunk.linear import decode

Tensor = torch.Tensor
SIZES = ("layers", "experts", "top_k", "neurons", "hidden")  # what the manifest repeats of the configuration
Report = Callable[[str, float], None]  # (what is being done, share done 0..1)
_bound: ContextVar[bool] = ContextVar("whether a compressed folder's model is bound with its weights", default=True)


@contextmanager
def unbound() -> Iterator[None]:
    """Around transformers' opening of a compressed folder, where the caller binds the model itself."""
    token = _bound.set(False)
    try:
        yield
    finally:
        _bound.reset(token)


def floe_experts(module: FloeExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor,
                 residual: Tensor | None = None, quantised: tuple[Tensor, ...] = ()) -> Tensor:
    """transformers' experts interface: hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]. And
    ours: on top of residual [T, H], like hidden_states; quantised: these as the runtime quantises them."""
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        out = Experts.apply(hidden_states, top_k_weights, top_k_index, module.runtime, module.layer)
        return out if residual is None else residual + out
    last = (residual, quantised) if quantised else () if residual is None else (residual,)
    return module.runtime.forward(module.layer, hidden_states, top_k_index, top_k_weights, *last)


ALL_EXPERTS_FUNCTIONS[EXPERTS] = floe_experts


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

    @staticmethod
    def put(model: nn.Module, path: str, origin: nn.Module) -> None:
        """Where `origin` stands in a model."""
        if not hasattr(origin, "identities"):
            model.set_submodule(path, FloeExperts(origin))
            return
        model.set_submodule(path, ShortcutExperts(origin))
        block = path.removesuffix(".mlp.experts")
        model.get_submodule(block).register_forward_hook(lambda block, _, out: block.mlp.experts.added_to(out))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, residual: Tensor | None = None,
                quantised: tuple[Tensor, ...] = ()) -> Tensor:
        _only_ours(self.origin.config)
        return ALL_EXPERTS_FUNCTIONS[EXPERTS](self, hidden_states, top_k_index, top_k_weights, residual, quantised)


class ShortcutExperts(FloeExperts):
    """LongCat-Flash's: chosen early in a block, added at its end (ScMoE, arXiv 2404.05019), some of them identities.

    Between the two stand a dense part and an attention, during which what is missing is fetched: the choice is known,
    not guessed. The block's own sum gets zeros, and the experts' after it, in the order of the block's additions.
    """

    _late: Callable[[], Tensor] | None = None  # of the choice under way: waits for what is missing, then computes

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        _only_ours(self.origin.config)
        returned = top_k_index >= self.num_experts
        same = hidden_states * torch.where(returned, top_k_weights, 0.0).sum(-1, keepdim=True)
        given = hidden_states, torch.where(returned, -1, top_k_index), torch.where(returned, 0.0, top_k_weights)
        learns = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        if learns or not isinstance(self.runtime, Runtime):
            return same.to(hidden_states.dtype) + floe_experts(self, *given)
        self._late = self.runtime.begin(self.layer, *given, same)
        return torch.zeros_like(hidden_states)

    def added_to(self, out: Tensor) -> Tensor:
        """out: what the block gives without them."""
        late, self._late = self._late, None
        return out if late is None else out + late().view_as(out)


def _only_ours(config) -> None:
    """UserError for an experts implementation that was asked for and cannot compute packed experts."""
    if config._experts_implementation != EXPERTS:
        raise UserError(f"The experts of a compressed model cannot run with experts_implementation="
                        f"{config._experts_implementation!r}; leave it out.")


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


class TrunkWeight(ConversionOps):
    """`name:codes` and `name:scales` to the weight `name`, which stays in its codes where a module multiplies with it
    or looks rows up in it. A router's is decoded: it is small, and look-ahead reads it too."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # tells transformers not to cast what it hands over

    def convert(self, input_dict: dict, full_layer_name: str | None = None, model=None, **kwargs) -> dict:
        codes, scales = (input_dict[key][0] if isinstance(input_dict[key], list) else input_dict[key]
                         for key in (CODES, SCALES))
        weight, module = model.get_parameter(full_layer_name), model.get_submodule(full_layer_name.rpartition(".")[0])
        spec = model.floe_spec
        router = tuple(weight.shape) == (spec.experts + spec.identities, spec.hidden)
        if isinstance(module, (nn.Linear, nn.Embedding)) and not router:
            return {full_layer_name: packed_parameter(codes, scales, weight.dtype)}
        return {full_layer_name: decode(codes, scales).to(weight.dtype)}


@register_quantizer("floe")
class FloeQuantizer(HfQuantizer):
    """Empty experts before the weights are loaded, far memory behind them afterwards."""

    def __init__(self, quantization_config: FloeConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True  # wherever they come from: codes must not be cast to the model's type

    def validate_environment(self, device_map: dict | str | int | None = None, **_: Any) -> None:
        """UserError for a trunk that is to lie in several places, one of them the disk or main memory."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or len(places) > 1 and "cpu" in places:
            raise UserError("A compressed model cannot be opened with a device_map that offloads parts of it: its "
                            "experts stay out of the card's memory anyway; leave device_map out, or name one device.")

    def update_attn_implementation(self, config):
        """The first sight of the configuration, before a model takes what was asked for or its own default."""
        if self.quantization_config.binds and config._experts_implementation is not None:
            _only_ours(config)  # a checkpoint's has been to a skeleton, which set its own default
        config._experts_implementation = EXPERTS
        return config

    def is_serializable(self, *_: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        """The trunk is stored under the model's own names: of all conversions only ours applies."""
        return [WeightConverter([CODES, SCALES], [""], [TrunkWeight(self)])]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        name = Path(str(model.config.name_or_path or type(model).__name__)).name
        model.floe_machine = machine_for("cpu", Path.cwd())  # its memory before the weights take theirs
        experts = experts_modules(model, name)
        model.floe_spec = model_spec(name, model, experts)
        if self.quantization_config.binds:
            model.floe_manifest = _manifest_of(model)
        for path, module in experts.items():
            if not isinstance(module, LookupExperts):
                FloeExperts.put(model, path, module)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.quantization_config.binds or not _bound.get():
            return
        with proving(Path(model.config.name_or_path)):
            far, planner = blobs_of(model)
            bind(model, host_side_of(far), far, planner, "exact", planner.near_bytes("exact"))
        model.save_pretrained = MethodType(save_copy, model)


def save_copy(model: nn.Module, save_directory: str | Path, **asked: Any) -> None:
    """In place of `save_pretrained`: the folder once more, as it lies on the disk. UserError for a place that is taken
    and for whatever else transformers could do on this occasion."""
    source, dest = Path(model.config.name_or_path), Path(save_directory)
    if wanted := sorted(name for name, value in asked.items() if value):
        raise UserError(f"A compressed model is saved as a copy of its folder, without {', '.join(wanted)}.")
    if dest.is_dir() and any(dest.iterdir()) or dest.is_file():
        raise UserError(f"{dest} is not empty; choose another folder.")
    entries = model.floe_manifest.files
    check_room(dest.absolute(), sum(entry.bytes for entry in entries))
    try:
        dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise trouble(error, dest) from error
    for name in (*(entry.path for entry in entries if (source / entry.path).is_file()), MANIFEST):
        with writing(dest / name):
            shutil.copyfile(source / name, dest / name)


def host_side_of(far: Far) -> type[Runtime]:
    """What computes the experts of a compressed folder on the processor."""
    return LookupRuntime if isinstance(far, FarTable) else HostRuntime


def blobs_of(model: nn.Module) -> tuple[FarBlobs | FarTable, Planner]:
    """The far memory of a model whose trunk came from a compressed folder, and its plan for the processor."""
    stored = model.floe_manifest
    planner = Planner(model.floe_spec, model.floe_machine, stored.trunk_bits, stored.group_size, stored.calibration)
    folder, spec = Path(model.config.name_or_path), model.floe_spec
    if stored.has_table != bool(spec.table_bytes):
        raise UserError(_two_models(folder))
    far = (FarTable if stored.has_table else FarBlobs)(folder, stored)
    if stored.has_table and len(far.table) != spec.vocabulary:
        raise UserError(_two_models(folder))
    return far, planner


def _two_models(folder: Path) -> str:
    return (f"{folder} is damaged (config.json and floe.json are of different models); download or compress the model "
            "again.")


def _manifest_of(model: nn.Module) -> Manifest:
    """The manifest of the folder that a model without weights comes from. UserError where they are of different
    models: transformers would make up what is missing, however large."""
    folder, spec = Path(model.config.name_or_path), model.floe_spec
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder on this machine; download the model first.")
    manifest = Manifest.load(folder)
    trunk_bytes = next(entry.bytes for entry in manifest.files if entry.path == TRUNK)
    if spec.trunk_params > 2 * trunk_bytes or any(getattr(manifest, name) != getattr(spec, name) for name in SIZES):
        raise UserError(_two_models(folder))
    return manifest


def level_plans(calibration: dict) -> dict[str, LevelPlan]:
    """The levels that a folder's calibration offers."""
    def rows(found: dict, key: str) -> tuple:
        return tuple(tuple(row) for row in found.get(key, ()))
    return {level: LevelPlan(rows(found, "budgets"), rows(found, "thresholds"))
            for level, found in calibration.get("levels", {}).items() if "budgets" in found or "thresholds" in found}


def bind(model: nn.Module, side: type[Runtime], far: Far, planner: Planner, level: str, near_bytes: int | None,
         predict: bool = True, **given: Any) -> Runtime:
    """Put one runtime of that side over `far` behind the model's experts modules. given: its device, tokens, dtype."""
    places = [(path, module) for path, module in model.named_modules()
              if isinstance(module, FloeExperts | LookupExperts)]
    device = given.get("device", "cpu")
    layers = [layer_experts(model, path, index, far, device) for index, (path, _) in enumerate(places)]
    levels = level_plans(planner.calibration)
    runtime = side(far, layers, planner.spec.top_k, levels, level, near_bytes, predict, **given)
    for layer, (_, module) in zip(layers, places, strict=True):
        module.runtime, module.layer = runtime, layer
    model.floe = runtime
    Windows(runtime).watch(model)
    return runtime


def layer_experts(model: nn.Module, path: str, index: int, far: Far, device: str) -> LayerExperts | TableLayer:
    """What the experts module at `path` computes with, on `device`; rows of a table with nothing."""
    module, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    if isinstance(module, LookupExperts):
        return TableLayer(index)
    norm, identities = getattr(module, "post_expert_norm", None), getattr(module.origin, "identities", 0)
    router = _router_weight(parent, (far.experts + identities, far.hidden))
    return LayerExperts(
        index, not module.origin.is_concatenated, module.origin._apply_gate,
        {name: bias.to(device) for name, bias in far.biases(index).items()},
        None if norm is None else copy.deepcopy(norm).to(device),
        None if router is None else router[:far.experts].to(device, torch.float32),
        hasattr(module.origin, "identities"))


def _router_weight(block: nn.Module, shape: tuple[int, int]) -> Tensor | None:
    """The router's matrix [E, H] beside the experts, whatever the architecture calls it."""
    return next((p.detach() for name, p in block.named_parameters()
                 if tuple(p.shape) == shape and not name.startswith("experts.")), None)
