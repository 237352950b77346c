"""The door to the engine: everything that the page, the command line and the tests may use.

Importing this loads no torch; the names that need it are fetched on first use.
"""
from __future__ import annotations

from importlib import import_module

from engine.spec import (
    LEVELS,
    PROMISES,
    Counters,
    Event,
    Machine,
    MachineError,
    ModelSpec,
    Options,
    Sampling,
    Stopped,
    UserError,
)

_LAZY = {"Engine": "engine.generate", "data_dir": "engine.paths", "demo_model": "engine.paths",
         "models_dirs": "engine.paths", "choose_models_dir": "engine.paths",
         "download": "engine.fetch", "Choice": "engine.fetch", "Hub": "engine.hub",
         "Progress": "engine.progress", "Installed": "engine.installed", "models": "engine.installed",
         "delete": "engine.installed", "here": "engine.fitting", "outlooks": "engine.fitting",
         "publish": "engine.publishing", "import_gguf": "engine.gguf_import",
         "measured": "engine.fitting", "fitted": "engine.fitting", "Known": "engine.catalogue",
         "look_up": "engine.catalogue", "what_binds": "engine.binding", "CardMeter": "engine.card",
         "compress_installed": "engine.local", "compressed_name": "engine.local", "import_file": "engine.local",
         "calibrate_installed": "engine.local", "drop_calibration": "engine.local"}

__all__ = ["LEVELS", "PROMISES", "Counters", "Event", "Machine", "MachineError", "ModelSpec", "Options", "Sampling",
           "Stopped", "UserError", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
