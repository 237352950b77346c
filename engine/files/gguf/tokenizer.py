"""What an import needs and a GGUF file does not hold: the original's config.json; and a tokenizer, which it may hold.

Configuration and tokenizer come from a folder or a repository of the original. Where that has no tokenizer, the
file's own vocabulary and merges make one (transformers' converter), if its way of splitting text is one that the
converter knows; the chat template then is the file's as well.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.core import UserError
from engine.files.chat_parts import TEMPLATE, TOKENIZERS, has_template
from engine.files.folder_writer import copy_file
from engine.files.gguf.names import MODEL_TYPES
from engine.files.manifest import CONFIG, COPIED
from engine.files.skeleton import read_config, text_config_of

SPLIT_OF_GPT2 = ("gpt-2",)      # the split that a byte-level vocabulary has where the file names no other


def config_of(like: Path):
    """The language model's configuration. UserError where no GGUF file could belong to it: before a long download."""
    config = text_config_of(read_config(like))
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"GGUF files of {config.model_type} models are not imported; these are: "
                        f"{', '.join(sorted(MODEL_TYPES))}. Take the original checkpoint instead.")
    return config


def copy_small(source: Path, folder: Path) -> None:
    if not (source / CONFIG).is_file():
        raise UserError(f"{source} has no {CONFIG}; give the folder of the original model.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*COPIED, CONFIG):
        copy_file(source / name, folder / name)


def completed(like: Path, file: Path, texts: Mapping[str, str], scratch: Path) -> Path:
    """`like` if it has a tokenizer and a chat template, else `scratch` with its files and what `file` adds to them.
    texts: of the file's metadata (`GgufSource.texts`)."""
    template = texts["tokenizer.chat_template"]
    has_tokenizer = any((like / name).is_file() for name in TOKENIZERS)
    if has_tokenizer and (has_template(like) or not template):
        return like
    copy_small(like, scratch)
    if not has_tokenizer:
        rebuild_tokenizer(file, texts, scratch)
    if template:
        (scratch / TEMPLATE).write_text(template, encoding="utf-8")
    return scratch


def check_talk(like: Path, name: str, texts: Mapping[str, str]) -> None:
    """UserError where neither `like` nor the file of that name, by its metadata, has what a chat needs."""
    if not any((like / own).is_file() for own in TOKENIZERS):
        _refuse_unknown(name, texts)
    if not has_template(like) and not texts["tokenizer.chat_template"]:
        raise UserError(f"Neither {name} nor its original has a chat template ({TEMPLATE}), so it is no chat model; "
                        "take the variant that was tuned for chat.")


def rebuild_tokenizer(file: Path, texts: Mapping[str, str], folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json from the file's metadata. UserError where that would be guessing."""
    _refuse_unknown(file.name, texts)
    from transformers import PreTrainedTokenizerFast
    try:
        made = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:          # transformers raises many kinds for vocabularies it cannot take
        raise UserError(f"The tokenizer in {file.name} cannot be rebuilt ({type(error).__name__}); name the original "
                        "with --like: its tokenizer.json is needed.") from error
    made.save_pretrained(folder)


def _refuse_unknown(name: str, texts: Mapping[str, str]) -> None:
    kind, split = texts["tokenizer.ggml.model"], texts["tokenizer.ggml.pre"]
    if kind != "llama" and not (kind == "gpt2" and split in _known_splits()):
        raise UserError(f"The tokenizer in {name} ({kind or 'none'}, {split or 'none'}) cannot be rebuilt; name "
                        "the original with --like: its tokenizer.json is needed.")


def _known_splits() -> tuple[str, ...]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as splits
    except ImportError:                 # an older transformers splits everything as GPT-2 does
        splits = {}
    return (*SPLIT_OF_GPT2, *splits)

