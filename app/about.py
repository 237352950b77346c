"""Which program this is, and what it runs on: versions and licences."""
from __future__ import annotations

from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version

LIBRARIES = ("torch", "transformers", "gradio", "fastapi", "uvicorn", "huggingface-hub", "safetensors", "tokenizers",
             "numba", "triton", "triton-windows", "markdown-it-py", "latex2mathml", "pygments", "llguidance", "pypdf",
             "charset-normalizer", "psutil", "pydantic", "jinja2")  # what a person meets; the rest are their own


@cache
def version_of_program() -> str:
    try:
        return version("floechat")
    except PackageNotFoundError:  # started from its source, as the launchers do
        import tomllib
        from pathlib import Path
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]


@cache
def libraries() -> list[dict]:
    """{"name", "version", "licence"} of each that is installed."""
    found = []
    for name in LIBRARIES:
        try:
            each = distribution(name)
        except PackageNotFoundError:  # that of another system
            continue
        found.append({"name": name, "version": each.version, "licence": licence(each)})
    return found


def licence(each: Distribution) -> str:
    """As its metadata say it: the expression, else the classifier's last word, else a short text; "" where none is."""
    said = each.metadata.get("License-Expression") or ""
    classified = [line.rpartition(" :: ")[2] for line in each.metadata.get_all("Classifier") or ()
                  if line.startswith("License :: ")]
    text = (each.metadata.get("License") or "").strip()
    return said or ", ".join(classified) or (text if len(text) < 60 else text.splitlines()[0][:60])
