"""Texts to measure on: kinds of files, cutting, and one clear sentence for a bad one."""
from __future__ import annotations

import contextlib
import json
import lzma
import tracemalloc
from pathlib import Path

import pytest

from engine.core import UserError
from engine.model.load import load_tokenizer
from engine.quality.texts import CALIBRATION_TEXT, EVALUATION_TEXT, MAX_CHARACTERS, read_documents, read_tokens

CHAT = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello there."}]


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: Path):
    return load_tokenizer(demo_checkpoint)


def written(path: Path, text: str) -> Path:
    if path.suffix == ".xz":
        path.write_bytes(lzma.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.md"])
def test_documents_end_at_the_separator(tmp_path: Path, tokenizer, name: str) -> None:
    path = written(tmp_path / name, "One fish.\nTwo fish.\n<|endoftext|>\n\n<|endoftext|>\nRed fish.\n")
    assert [tokenizer.decode(ids) for ids in read_documents(path, tokenizer)] == ["One fish.\nTwo fish.", "Red fish."]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz"])
def test_conversations_are_rendered_by_the_template(tmp_path: Path, tokenizer, name: str) -> None:
    path = written(tmp_path / name, json.dumps({"messages": CHAT, "source": "test"}) + "\n\n")
    expected = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert list(read_documents(path, tokenizer)) == [expected]


def test_tokens_are_cut_at_the_number_and_at_the_longest(tmp_path: Path, tokenizer) -> None:
    story = "The dog ran to the big tree and sat down. " * 20
    path = written(tmp_path / "a.txt", f"{story}\n<|endoftext|>\n{story}")
    whole = next(read_documents(path, tokenizer))
    pieces = read_tokens(path, tokenizer, len(whole) + 30, longest=50)
    assert sum(len(piece) - 1 for piece in pieces) == len(whole) + 30
    assert max(map(len, pieces)) == 50 and min(map(len, pieces)) > 1
    read = [i for piece in pieces for i in piece]
    assert read == (whole + whole)[:len(read)]
    assert read_tokens(path, tokenizer, 10**6) == [whole, whole]


def test_only_what_is_asked_for_is_read(tmp_path: Path, tokenizer) -> None:
    good = json.dumps({"messages": CHAT})
    path = written(tmp_path / "a.jsonl", good + "\n" + good + "\nnot json\n")
    assert list(map(len, read_tokens(path, tokenizer, 12))) == [13]
    with pytest.raises(UserError, match="Line 3"):
        read_tokens(path, tokenizer, 1000)


def test_a_text_without_separators_is_cut(tmp_path: Path, tokenizer) -> None:
    path = written(tmp_path / "a.txt", "word" * (MAX_CHARACTERS // 4) + " more words")
    documents = list(read_documents(path, tokenizer))
    assert len(documents) == 2 and tokenizer.decode(documents[1]).endswith("more words")


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("a.txt", None, "cannot be read"),
    ("a.txt", b"\xff\xfe\x00 no text", "not UTF-8"),
    ("a.txt.xz", b"not compressed", "damaged"),
    ("a.txt.xz", lzma.compress(b"word " * 9999)[:-20], "damaged"),
    ("a.txt", b"\n<|endoftext|>\n", "no text to measure on"),
    ("a.jsonl", b'{"text": "hello"}\n', "no conversation"),
    ("a.jsonl", b'[1, 2]\n', "no conversation"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "no conversation"),
    ("a.jsonl", b'{"messages": ["hello"]}\n', "no conversation"),
])
def test_a_bad_file_gets_one_sentence(tmp_path: Path, tokenizer, name: str, content: bytes | None, sentence) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read_tokens(path, tokenizer, 1000)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_our_own_texts_do_not_overlap_and_are_our_own(tokenizer) -> None:
    fitted, tested = (path.read_text(encoding="utf-8").splitlines() for path in (CALIBRATION_TEXT, EVALUATION_TEXT))
    assert all(json.loads(line)["source"].startswith("synthetic:") for line in fitted + tested)
    assert not {json.dumps(json.loads(line)["messages"]) for line in fitted} & {
        json.dumps(json.loads(line)["messages"]) for line in tested}
    assert sum(len(ids) - 1 for ids in read_tokens(EVALUATION_TEXT, tokenizer, 4096)) == 4096
    assert CALIBRATION_TEXT.stat().st_size < 200_000 and EVALUATION_TEXT.stat().st_size < 200_000


@pytest.mark.parametrize("name", ["a.txt.xz", "a.jsonl.xz"])
def test_a_line_without_end_is_not_read_whole(tmp_path: Path, tokenizer, name: str) -> None:
    with lzma.open(tmp_path / name, "wb", preset=0) as file:
        for _ in range(300):
            file.write(b"a" * (1 << 20))
    tracemalloc.start()
    try:
        with contextlib.suppress(UserError):  # of conversations, that it is none
            next(read_documents(tmp_path / name, tokenizer))
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()
