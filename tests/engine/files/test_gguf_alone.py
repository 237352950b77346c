"""A GGUF file without its original: configuration and tokenizer out of the file where it says all of them, else a
sentence that names the original."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from engine import UserError
from engine.files.manifest import Manifest
from engine.files.skeleton import read_config
from engine.library.gguf_import import import_gguf
from tests.support.architectures import build

gguf = pytest.importorskip("gguf")
from engine.files.gguf.config import Unsaid, describe  # noqa: E402
from engine.files.gguf.header import read_header  # noqa: E402
from engine.files.gguf.tokenizer import alone  # noqa: E402
from tests.support.gguf_files import ALONE, like, write  # noqa: E402

# What no file holds and no answer depends on, and the ids, which are the tokenizer's.
OTHERS = {"_name_or_path", "architectures", "dtype", "transformers_version", "initializer_range", "use_cache",
          "bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers", "full_attention_interval",
          "experts_implementation", "mtp_num_hidden_layers"}
# As llama.cpp's graph has it, whatever a configuration says; and positions as the family's real models have them.
FIXED = {"qwen3_moe": dict(norm_topk_prob=True), "qwen3_5_moe_text": dict(rope_parameters={
    "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    "mrope_interleaved": True})}
TALK = [{"role": "user", "content": "Hi"}]


def file_of(kind: str, folder: Path, tokenizer: Path, **changes) -> tuple[object, Path]:
    """-> (the configuration of the model that was written, its file with the embedded model's vocabulary)."""
    model = build(kind, vocab_size=4096, **FIXED.get(kind, {}) | changes)
    return model, write(folder / "model.gguf", kind, model, tokenizer=tokenizer)[0]


@pytest.mark.parametrize("kind", ALONE)
def test_the_configuration_is_the_original_s(kind, tmp_path, demo_checkpoint):
    model, path = file_of(kind, tmp_path, demo_checkpoint)
    folder = alone(path.name, path, read_header(path), tmp_path / "made")
    found, expected = read_config(folder).to_dict(), model.config.to_dict()
    assert {key: found.get(key) for key in expected if key not in OTHERS} == {
        key: value for key, value in expected.items() if key not in OTHERS}


def test_an_import_of_a_file_alone_is_that_with_the_original(tmp_path, demo_checkpoint):
    model, path = file_of("qwen3_moe", tmp_path, demo_checkpoint)
    original = like(tmp_path / "like", model, tokenizer=False)
    import_gguf(path, tmp_path / "alone", device="cpu")
    import_gguf(path, tmp_path / "beside", original, device="cpu")
    one, other = (Manifest.load(tmp_path / name) for name in ("alone", "beside"))
    assert {e.path: e.sha256 for e in one.files if e.path.startswith(("trunk", "experts", "tokenizer", "chat"))} == {
        e.path: e.sha256 for e in other.files if e.path.startswith(("trunk", "experts", "tokenizer", "chat"))}
    found, wanted = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "alone", demo_checkpoint))
    assert found.apply_chat_template(TALK, tokenize=True) == wanted.apply_chat_template(TALK, tokenize=True)
    ends = GenerationConfig.from_pretrained(tmp_path / "alone").eos_token_id
    assert wanted.eos_token_id in ends and all(wanted.decode([end]).startswith("<|") for end in ends)


UNSAID = {
    "a family of which files say too little": ({"general.architecture": "olmoe"}, "architecture olmoe"),
    "a number is missing": ({"qwen3moe.rope.freq_base": None}, "it has no rope.freq_base"),
    "a key that is not known": ({"qwen3moe.attention.clamp_kqv": 8.0}, "attention.clamp_kqv is not known here"),
    "positions scaled as nobody here knows": ({"qwen3moe.rope.scaling.type": "longrope"}, "scaled by longrope"),
    "a part of a head is rotated": ({"qwen3moe.rope.dimension_count": 8}, "only a part of its heads"),
    "keys and values differ": ({"qwen3moe.attention.value_length": 8}, "different sizes"),
    "no model": ({"qwen3moe.attention.head_count": "four"}, "its numbers are no qwen3_moe model's"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, demo_checkpoint):
    return read_header(file_of("qwen3_moe", tmp_path_factory.mktemp("whole"), demo_checkpoint)[1])


@pytest.mark.parametrize("changes, words", UNSAID.values(), ids=UNSAID)
def test_what_a_file_does_not_say_is_not_guessed(whole, tmp_path, changes, words):
    fields = {key: value for key, value in (whole.fields | changes).items() if value is not None}
    with pytest.raises(Unsaid, match=words):
        describe(replace(whole, fields=fields), {}, tmp_path)


def test_yarn_is_read_and_so_is_how_tokens_are_drawn(whole, tmp_path):
    fields = whole.fields | {"qwen3moe.rope.scaling.type": "yarn", "qwen3moe.rope.scaling.factor": 4.0,
                             "qwen3moe.rope.scaling.original_context_length": 64, "general.sampling.temp": 0.7}
    describe(replace(whole, fields=fields), {"<|call|>": 9}, tmp_path)
    rope = read_config(tmp_path).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 64)
    told = json.loads((tmp_path / "generation_config.json").read_text())
    assert told["temperature"] == 0.7 and told["do_sample"] and 9 in told["eos_token_id"]


def test_the_sentence_names_the_original_where_the_file_does(tmp_path, demo_checkpoint):
    model = build("olmoe", vocab_size=4096)
    (path,) = write(tmp_path / "o.gguf", "olmoe", model, tokenizer=demo_checkpoint, base="me/Original")
    with pytest.raises(UserError, match=r"o.gguf cannot be imported by itself .*--like.*; the file names "
                                        r"me/Original\.$") as caught:
        import_gguf(path, tmp_path / "made", device="cpu")
    assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()


def test_a_tensor_that_the_configuration_has_no_place_for(tmp_path, demo_checkpoint):
    """Rotary factors change what is said; the original's configuration would know of them."""
    model = build("qwen3_moe", vocab_size=4096, **FIXED["qwen3_moe"])
    (path,) = write(tmp_path / "m.gguf", "qwen3_moe", model, tokenizer=demo_checkpoint, beside="rope_freqs.weight")
    with pytest.raises(UserError, match="rope_freqs.weight is not known here.*name the original"):
        import_gguf(path, tmp_path / "made", device="cpu")
