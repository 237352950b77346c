"""What a model's folder says about it, for a page or a person: levels with their measured loss, recommended sampling.

Read once when a model is opened; plain JSON values only.
"""
from __future__ import annotations

from pathlib import Path

from engine.chat.template import ChatTemplate
from engine.core import MachineError, Sampling, UserError
from engine.decode.sampling import merged
from engine.files.manifest import Manifest, is_compressed
from engine.paths import demo_model


def about(loaded, template: ChatTemplate, folder: Path | None, context: int) -> dict:
    """loaded: engine.model.load.Loaded. {"name", "is_demo", "levels": {level: measured numbers}, "sampling", "wishes":
    the variables that the chat template looks at, "context", "layers", "experts", "top_k", "neurons", "hidden"}."""
    spec = loaded.spec
    return {
        "name": folder.resolve().name if folder else spec.name,
        "is_demo": folder is not None and folder.resolve() == demo_model().resolve(),
        "levels": _levels(loaded.runtime.levels, folder),
        "sampling": merged(Sampling(), getattr(loaded.model, "generation_config", None)),
        "wishes": _wishes(template),
        "context": context,
        "layers": spec.layers, "experts": spec.experts, "top_k": spec.top_k, "neurons": spec.neurons,
        "hidden": spec.hidden,
    }


def _wishes(template: ChatTemplate) -> list[str]:
    try:
        return sorted(template.asks())
    except (UserError, MachineError):  # the first answer says what is wrong with it
        return []


def _levels(offered: tuple[str, ...], folder: Path | None) -> dict[str, dict]:
    """Each offered level with the numbers that calibration measured for it (none: not measured)."""
    compressed = folder is not None and is_compressed(folder)
    measured = Manifest.load(folder).calibration.get("levels", {}) if compressed else {}
    return {level: {name: value for name, value in measured.get(level, {}).items() if isinstance(value, (int, float))}
            for level in offered}
