"""A model's config.json as plain values, within the limits of what a model can have. Loads no torch.

Anybody can write a configuration; transformers makes a list, or a layer, of as many as it says.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from engine.core import UserError
from engine.disk import read_json
from engine.files.manifest import CONFIG

MOST_LAYERS = 512
MOST = 1 << 15
MOST_NUMBER = 1 << 62
MOST_BYTES = 2 << 20  # of config.json
_LAYERS, _COUNTS = re.compile(r"(layers?|depth|blocks)$"), re.compile(r"(labels|experts|heads|groups?)$")


def read_config_json(folder: Path) -> dict:
    """The folder's config.json. UserError where it is missing, damaged, or has numbers that no model has."""
    path = folder / CONFIG
    try:
        config = read_json(path, MOST_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no model: it has no {CONFIG}.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); download the model again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model's configuration; download the model again.")
    for name, value in _values(config):
        if _too_much(name, value):
            raise UserError(f"{path} has a {name!r} that no model has; download the model again.")
    return config


def _values(config: dict) -> Iterator[tuple[str, object]]:
    """Every key with its value, however deep."""
    parts: list = [config]
    while parts:
        part = parts.pop()
        for name, value in part.items() if isinstance(part, dict) else (("list", each) for each in part):
            yield str(name)[:60], value
            if isinstance(value, list | dict):
                parts.append(value)


def _too_much(name: str, value) -> bool:
    if isinstance(value, list | dict | str):
        return len(value) > MOST
    most = (MOST_LAYERS if _LAYERS.search(name) else MOST if _COUNTS.search(name)
            else MOST_NUMBER if isinstance(value, int) else float("inf"))
    return isinstance(value, int | float) and abs(value) > most
