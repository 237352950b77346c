"""What an import needs besides weights: the original's config.json and tokenizer, or what the file says of both.

They come from a folder or a repository of the original. Where that has no tokenizer, the file's own vocabulary and
merges make one (transformers' converter), if that gives the original's tokens; the chat template then is the file's as
well. A file that comes alone may say all of its configuration, too (engine/files/gguf/config.py).
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers.normalizers import NFC
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.core import UserError
from engine.files.chat_parts import TEMPLATE, TOKENIZERS, has_template
from engine.files.folder_writer import copy_file
from engine.files.gguf.config import Unsaid, describe, refuse
from engine.files.gguf.header import GgufHeader, write_metadata
from engine.files.gguf.names import MODEL_TYPES
from engine.files.gguf.source import refuse_unknown
from engine.files.manifest import CONFIG, COPIED
from engine.files.skeleton import read_config, text_config_of

# Ways of splitting text at which transformers' converter gives the original's tokens, and whether the original composes
# letters and accents first, which no file says (NOTES.md: against the encodings that llama.cpp's tests keep).
SPLITS = {"gpt-2": False, "qwen2": True, "qwen35": True, "gpt-4o": False}


SEEING_QWEN3 = "qwen3_vl_moe_text"      # transformers has no language model of it alone: of a text it is Qwen3's


def config_of(like: Path):
    """The language model's configuration. UserError where no GGUF file could belong to it: before a long download."""
    config = text_config_of(read_config(like))
    if config.model_type == SEEING_QWEN3:
        config = _as_qwen3(config)
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"GGUF files of {config.model_type} models are not imported; these are: "
                        f"{', '.join(sorted(MODEL_TYPES))}. Take the original checkpoint instead.")
    return config


def _as_qwen3(config):
    """Of a text all three positions of a token are one, and the router's weights are always normed."""
    rope = {key: value for key, value in config.rope_parameters.items() if not key.startswith("mrope")}
    given = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    made = AutoConfig.for_model("qwen3_moe", **given | {"rope_parameters": rope, "norm_topk_prob": True,
                                                        "num_experts": config.num_experts})
    made.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[made.model_type]]
    return made


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
        try:
            _check_split(texts)
        except Unsaid as why:
            raise _not_rebuilt(name, why) from why
    if not has_template(like) and not texts["tokenizer.chat_template"]:
        raise UserError(f"Neither {name} nor its original has a chat template ({TEMPLATE}), so it is no chat model; "
                        "take the variant that was tuned for chat.")


def alone(name: str, file: Path, header: GgufHeader, folder: Path) -> Path:
    """`folder` with all that an import needs, out of the file of that name. file: its first part, or the beginning of
    it; header: of all parts. UserError, which names the original where the file does, if that would be guessing."""
    refuse_unknown(name, str(header.fields.get("general.architecture", ""))[:40])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        made = _rebuilt(file, header.texts)
        describe(header, made.get_vocab(), folder)
    except Unsaid as why:
        raise refuse(name, str(why), header.fields) from why
    made.save_pretrained(folder)
    return folder


def rebuild_tokenizer(file: Path, texts: Mapping[str, str], folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json from the file's metadata. UserError where that would be guessing."""
    try:
        made = _rebuilt(file, texts)
    except Unsaid as why:
        raise _not_rebuilt(file.name, why) from why
    made.save_pretrained(folder)


def _not_rebuilt(name: str, why: Unsaid) -> UserError:
    return UserError(f"The tokenizer in {name} cannot be rebuilt ({why}); name the original model (--like in a "
                     "terminal): its tokenizer.json is needed.")


def _rebuilt(file: Path, texts: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Unsaid where its tokens could be others than the original's."""
    split = _check_split(texts)
    with TemporaryDirectory(prefix="floe-", ignore_cleanup_errors=True) as folder:
        metadata = Path(folder) / "metadata.gguf"
        write_metadata(file, metadata)
        try:
            made = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=metadata.name, local_files_only=True)
        except Exception as error:          # transformers raises many kinds for vocabularies it cannot take
            raise Unsaid(type(error).__name__) from error
    if SPLITS[split]:
        made.backend_tokenizer.normalizer = NFC()
    return made


def _check_split(texts: Mapping[str, str]) -> str:
    kind, split = (texts[key] or "none" for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != "gpt2" or split not in SPLITS:
        raise Unsaid(f"it does not say enough of how text is split: {kind[:40]}, {split[:40]}")
    return split
