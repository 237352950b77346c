"""A finished compressed folder onto a Hub, in one commit, with a model card written from what the folder says.

The card has the levels with their measured perplexities, the sizes, and how to load it. A README.md of the folder's own
comes first in it. The upload is the client library's, without Xet; what has been uploaded before is not sent again.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from engine.core import MachineError, UserError
from engine.files.folder_writer import portable
from engine.files.manifest import CONFIG, COPIED, MANIFEST, TABLE, Manifest, file_entry, is_compressed
from engine.library import catalogue
from engine.library.hub import Hub
from engine.library.installed import Source
from engine.planning.explain import LEVEL_WORDS
from engine.units import size

CARD = "README.md"


def publish(folder: Path, repository: str, hub: Hub, private: bool = False,
            report: Callable[[str], None] = lambda sentence: None) -> str:
    """Upload the folder; -> address of the commit. UserError: not a finished folder, no right to write there."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.errors import HFValidationError, HTTPError
    report("Checking every file against its sha256")
    manifest = checked(folder)
    proved = {entry.path for entry in manifest.files}
    others = [name for name in (MANIFEST, CONFIG, *COPIED) if (folder / name).is_file() and name not in proved]
    operations = [CommitOperationAdd(name, str(folder / name)) for name in sorted(proved)]
    operations += [CommitOperationAdd(name, portable(folder / name) or str(folder / name)) for name in others]
    operations.append(CommitOperationAdd(CARD, card(folder, manifest, repository).encode()))
    constants.HF_HUB_DISABLE_XET = True
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    report(f"Uploading {len(operations)} files to {repository}")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.create_commit(repository, operations, commit_message="Floe Chat folder").commit_url)
    except HFValidationError as error:
        raise UserError(f"{repository!r} is not a Hub id; write it like owner/name.") from error
    except (HTTPError, RuntimeError, ValueError) as error:
        raise _sentence(hub, repository, error) from error


def checked(folder: Path) -> Manifest:
    """The manifest of a folder whose files are all what it says they are. UserError otherwise."""
    if not is_compressed(folder):
        raise UserError(f"{folder} is not a finished compressed folder; compress the model first.")
    manifest = Manifest.load(folder)
    manifest.check_sizes(folder)
    for entry in manifest.files:
        if file_entry(folder / entry.path) != entry:
            raise UserError(f"{folder / entry.path} is damaged (its sha256 differs); download or compress the model "
                            "again.")
    return manifest


def card(folder: Path, manifest: Manifest, repository: str) -> str:
    """The model card: front matter, the folder's own words if it has any, and the generated part."""
    front, own = _own_words(folder)
    source = Source.load(folder)
    origin = source.repository if source and source.kind == "original" else ""
    front = front or _front(origin)
    name = repository.partition("/")[2]
    parts = [f"---\n{front}\n---", own or f"# {name}\n\nA Mixture-of-Experts model compressed for Floe Chat"
             + (f", from {origin} at commit {source.commit}." if origin else "."), _sizes(manifest),
             *_specialist(manifest), _levels(manifest), _how_to(repository)]
    return "\n\n".join(parts) + "\n"


def _front(origin: str) -> str:
    """What the Hub reads; the licence is the original's, where the catalogue knows it."""
    entry = catalogue.find(origin) if origin else None
    lines = ["library_name: floechat", "tags: [floe, mixture-of-experts]"]
    lines += [f"license: {entry.licence}"] if entry else []
    lines += [f"base_model: {origin}", "base_model_relation: quantized"] if origin else []
    return "\n".join(lines)


def _own_words(folder: Path) -> tuple[str, str]:
    """Front matter and text of the folder's README.md, without a generated part of earlier."""
    if not (folder / CARD).is_file():
        return "", ""
    text = (folder / CARD).read_text(encoding="utf-8").partition("\n## Sizes\n")[0]
    if text.startswith("---\n") and "\n---" in text[4:]:
        front, _, rest = text[4:].partition("\n---")
        return front.strip(), rest.strip()
    return "", text.strip()


def _sizes(manifest: Manifest) -> str:
    total = sum(entry.bytes for entry in manifest.files)
    if manifest.has_table:
        table = next(entry.bytes for entry in manifest.files if entry.path == TABLE)
        return (f"## Sizes\n\n{manifest.layers} layers of {manifest.experts} experts, kept as a table of 16 bits, "
                f"{size(table)}, of which a token reads one row. All other weights at {manifest.trunk_bits} bits. "
                f"Together {size(total)}.")
    experts = sum(entry.bytes for entry in manifest.files if entry.path.startswith("experts-"))
    return (f"## Sizes\n\n{manifest.layers} MoE layers of {manifest.experts} experts ({manifest.top_k} routed), "
            f"{manifest.neurons} neurons each, hidden {manifest.hidden}. Experts: 2-bit sketches and 4-bit records, "
            f"groups of {manifest.group_size}, {size(experts)}. All other weights at {manifest.trunk_bits} bits. "
            f"Together {size(total)}.")


def _specialist(manifest: Manifest) -> list[str]:
    """What a model with fewer experts was made of, and what that cost (engine/quality/specialists/)."""
    found = manifest.calibration.get("specialist")
    if not found:
        return []
    rows = [f"| {texts} | {_number(found, f'{name}_before')} | {_number(found, name)} |" for name, texts in (
        ("held_out", "texts of its kind that it was not fitted to"), ("general", "other texts"))]
    return ["\n".join([f"## Specialist\n\nMade of {found.get('of')} for texts of one kind: {manifest.experts} of its "
                       f"{found.get('experts')} experts a layer are left, by {found.get('way')}. Perplexity, on pieces "
                       "of 64 tokens:", "", f"| | {found.get('of')} | this model |", "|---|---|---|", *rows])]


def _levels(manifest: Manifest) -> str:
    levels = manifest.calibration.get("levels") or {}
    if manifest.has_table:
        return "## Levels\n\nLevel `exact` only: there is nothing in a table to leave out."
    if not levels:
        return ("## Levels\n\nNot calibrated: level `exact` only. `python -m engine calibrate FOLDER` measures the "
                "others.")
    rows = [f"| {level} | {LEVEL_WORDS.get(level, '')} | {_number(found, 'perplexity')} | {_number(found, 'kl')} |"
            for level, found in levels.items()]
    return "\n".join(["## Levels", "", "Measured on the calibration text of the folder.", "",
                      "| level | what it promises | perplexity | KL to the original |", "|---|---|---|---|", *rows])


def _number(found: dict, key: str) -> str:
    value = found.get(key)
    return f"{value:.3f}" if isinstance(value, (int, float)) else "not measured"


def _how_to(repository: str) -> str:
    return (f"## How to load\n\nWith Floe Chat:\n\n    python -m engine download {repository}\n"
            f"    python -m engine chat {repository.partition('/')[2]}\n\n"
            "With transformers, from a downloaded folder:\n\n    import engine.hf\n"
            "    from transformers import AutoModelForCausalLM\n"
            "    model = AutoModelForCausalLM.from_pretrained(FOLDER)")


def _sentence(hub: Hub, repository: str, error: Exception) -> Exception:
    """What went wrong, for a person; the client library wraps the server's answer in errors of its own."""
    while error.__cause__ is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is not None and response.status_code in (401, 403):
        return UserError(f"{hub.host} does not let you write to {repository}: log in with a token that may write "
                         "(hf auth login, or --token).")
    if response is not None:
        try:
            said = response.json().get("error") or ""
        except (json.JSONDecodeError, AttributeError, RuntimeError):
            said = ""
        return MachineError(f"{hub.host} refused the upload to {repository} ({response.status_code}"
                            + (f": {said}" if said else "") + "); try again later.")
    return MachineError(f"The upload to {repository} broke off ({type(error).__name__}); start again: what has arrived "
                        "is not sent twice.")
