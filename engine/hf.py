"""The door for transformers: after `import engine.hf` its `AutoModelForCausalLM.from_pretrained` opens our folders."""
from __future__ import annotations

from engine.model.load import Loaded, load

__all__ = ["Loaded", "load"]
