"""The door for transformers: after `import engine.hf` its `AutoModelForCausalLM.from_pretrained` opens our folders.

`python -m engine.hf serve FOLDER` is `transformers serve`, which opens them too, and `python -m engine.hf chat FOLDER
http://localhost:8000` talks to it; whatever else the command `transformers` does is there as well, but for its question
to the package index whether it is still the newest.
"""
from __future__ import annotations

from engine.model.load import Loaded, load

__all__ = ["Loaded", "load"]


def main() -> None:
    from transformers.cli.transformers import app
    app()


if __name__ == "__main__":
    main()
