"""The door to the engine: everything that the page, the command line and the tests may use.

Importing this loads no torch; the names that need it are fetched on first use.
"""
from __future__ import annotations

from importlib import import_module

from engine.core import (
    LEVELS,
    PROMISES,
    CallPiece,
    Counters,
    Event,
    Likelihood,
    Machine,
    MachineError,
    ModelSpec,
    Options,
    Picks,
    Request,
    Sampling,
    Stopped,
    ToolCall,
    UserError,
)
from engine.one_thread import one_thread

_DOORS = {  # module: its names that are everybody's
    "disk": ("only_one", "trouble"),
    "files.chat_parts": ("check_chat_parts",),
    "paths": ("data_dir", "demo_model", "models_dirs", "choose_models_dir", "make_private", "typed", "FIRST_LIGHT"),
    "plain_process": ("begin_process",),
    "progress": ("Progress",),
    "machine.gpu_monitor": ("CardMeter",),
    "planning.explain": ("plan_text",),
    "planning.bottleneck": ("what_binds",),
    "policies.presets": ("PRESETS", "measured_costs", "preset_of", "why_not"),
    "planning.pictures": ("plan_pictures",),
    "chat.engine": ("Engine",),
    "chat.habits": ("Habits",),
    "chat.growing_calls": ("FORCED", "GrowingCalls"),
    "decode.grammar": ("checked_schema",),
    "library.hub": ("Hub", "address"),
    "library.network": ("allow_hosts", "choose_mirror", "kept_hosts", "mirror", "plain_address"),
    "library.download": ("download",),
    "library.transfer": ("CompressOptions",),
    "library.catalogue": ("ModelInfo", "look_up", "title_of"),
    "library.hub_search": ("search_hub", "examine_repository"),
    "library.installed": ("Installed", "models", "delete", "empty_trash", "adopt_model"),
    "library.recommend": ("this_machine", "with_benchmarks", "plan_for", "recommendations", "verdict_of"),
    "quality.texts": ("CALIBRATION_TEXT",),
    "library.gguf_import": ("import_gguf",),
    "library.publish": ("publish",),
    "library.jobs": ("compress_installed", "compressed_name", "import_file", "calibrate_installed",
                     "drop_calibration"),
}
_LAZY = {name: f"engine.{module}" for module, names in _DOORS.items() for name in names}

__all__ = ["LEVELS", "PROMISES", "CallPiece", "Counters", "Event", "Likelihood", "Machine", "MachineError", "ModelSpec",
           "Options", "Picks", "Request", "Sampling", "Stopped", "ToolCall", "UserError", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        with one_thread:
            return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
