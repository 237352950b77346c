"""What holds for every verb of `python -m engine`: JSON on one line and nothing else, exit codes, one sentence."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.__main__ import VERBS, main
from engine.library import catalogue
from tests.engine.bench.test_synthetic import TINY, tiny
from tests.support import gguf_files
from tests.support.architectures import build
from tests.support.folders import write_tokenizer
from tests.support.loopback_hub import LoopbackHub
from tests.support.small_model import make

without_card = pytest.mark.skipif(torch.cuda.is_available(), reason="this computer has a card")
SAYINGS = [f"The {animal} ran to the {place} and sat down there for a long time." for animal in
           ("dog", "cat", "bird", "boy", "girl") for place in ("tree", "river", "house", "park")]


@dataclass
class Place:
    """What the verbs work on. like: the folder of the GGUF file's original; new: a folder to make."""

    checkpoint: Path
    compressed: Path
    gguf: Path
    like: Path
    text: Path
    trace: Path
    data: Path
    new: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory, demo_checkpoint) -> Place:
    base = tmp_path_factory.mktemp("verbs")
    checkpoint, compressed = make(base, demo_checkpoint)
    text = base / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(SAYINGS))
    model = build("qwen3_moe", num_hidden_layers=1)
    gguf_files.write(base / "m.gguf", "qwen3_moe", model)
    like = gguf_files.like(base / "like", model, tokenizer=False)
    write_tokenizer(like)
    assert main(["trace", str(compressed), "--prompts", str(text), "--out", str(base / "trace.npz"), "--tokens", "90",
                 "--most", "8", "--inputs", "--device", "cpu"]) == 0
    return Place(checkpoint, compressed, base / "m.gguf", like, text, base / "trace.npz", base / "data",
                 base / "new")


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Place:
    """With a data folder and a folder to make that are this test's own, and a Hub on the loopback interface."""
    monkeypatch.setattr(catalogue, "find", lambda name: tiny(name) if name in TINY else None)
    own = Place(**vars(made) | {"data": tmp_path / "data", "new": tmp_path / "new"})
    shutil.copytree(made.compressed, own.data / "models" / "small")
    with LoopbackHub() as hub:
        hub.add_folder("me/small", made.compressed)
        hub.add_folder("me/original", made.checkpoint)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield own


GOOD = {
    "compress": "{checkpoint} {new}",
    "calibrate": "{data}/models/small --text {text} --tokens 200",
    "chat": "{compressed} --prompt Hello --max-tokens 3 --policies evict=lfu,route=near:0.1 --near-bytes 64KiB",
    "eval": "{compressed} --text {text} --tokens 12",
    "bench": "{compressed} --level exact --near-bytes 64KiB",
    "hardware": "",
    "plan": "{compressed}",
    "download": "me/small",
    "models": "",
    "delete": "small",
    "import_gguf": "{gguf} {new} --like {like}",
    "publish": "{compressed} me/published --token hf_mine",
    "synth": "qwen3-30b-a3b --in-memory --layers 1 --level fast",
    "tables": "{checkpoint} --text {text} --tokens 40",
    "gpu": "first-light --fake --steps 0 --out {new}",
    "trace": "{compressed} --prompts {text} --out {new} --tokens 6 --most 3",
    "simulate": "{trace} --near 50% --policies predict=repeat,evict=lfu",
    "fit-predictor": "{compressed} {trace} --out {new} --epochs 1",
    "usage": "{compressed} --text {text} --tokens 90 --out {new}.svg",
    "specialise": "{compressed} {new} --text {text} --general {text} --tokens 200 --keep 0.5",
    "evidence": "{compressed} --out {new}.md --train 80 --test 24 --live 16",
}
BAD = {
    "compress": "{text} {new}",
    "calibrate": "{compressed} --text {text} --tokens -1",
    "chat": "{compressed} --prompt Hello --temperature -1",
    "eval": "{compressed} --levels best",
    "bench": "{compressed} --near-bytes much",
    "hardware": "--device cuda",
    "plan": "{text}",
    "download": "me/nothing",
    "models": "--data {text}",
    "delete": "nothing",
    "import_gguf": "{text} {new} --like {like}",
    "publish": "{checkpoint} me/published --token hf_mine",
    "synth": "llama --in-memory",
    "tables": "{compressed} --text {text}",
    "gpu": "step --model llama",
    "trace": "{checkpoint} --prompts {text} --out {new}",
    "simulate": "{text} --near 50%",
    "fit-predictor": "{compressed} {text} --out {new}",
    "usage": "{compressed}",
    "specialise": "{compressed} {new} --text {text} --keep 1",
    "evidence": "{checkpoint} --out {new}",
}


def arguments(verb: str, written: str, place: Place, *more: str) -> list[str]:
    """On a computer without a card the device is left to the verb."""
    found = [word.format(**vars(place)) for word in written.split()]
    device = () if "--device" in [*found, *more] or not torch.cuda.is_available() else ("--device", "cpu")
    return [verb, "--json", *(() if "--data" in found else ("--data", str(place.data))), *device, *more, *found]


def one_sentence(err: str) -> str:
    last = err.strip().splitlines()[-1].strip()
    assert last.endswith(".") and "Traceback" not in err and len(last) < 600, err
    return last


def test_every_verb_is_tried():
    assert set(GOOD) == set(BAD) == set(VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_json_is_one_document_on_one_line(verb, place, capfd):
    assert main(arguments(verb, GOOD[verb], place)) == 0
    out, err = capfd.readouterr()
    assert out.count("\n") == 1 and out.endswith("\n") and isinstance(json.loads(out), dict)
    assert err.strip(), "what happened is told on standard error"


@pytest.mark.parametrize("verb", VERBS)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(verb, place, capfd):
    if verb == "hardware" and torch.cuda.is_available():
        pytest.skip("this computer has a card")
    assert main(arguments(verb, BAD[verb], place)) == 2
    out, err = capfd.readouterr()
    assert out == "" and one_sentence(err)
    assert not place.new.exists(), "nothing was begun"


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_words_on_the_command_line_are_exit_code_2(verb, place, capfd):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--no-such-option"])
    assert caught.value.code == 2
    out, err = capfd.readouterr()
    assert out == "" and "usage: python -m engine" in err


@without_card
@pytest.mark.parametrize("verb", ["bench", "calibrate", "chat", "compress", "download", "eval", "gpu", "import_gguf",
                                  "synth"])
def test_a_card_that_is_not_there_is_one_sentence_and_exit_code_3(verb, place, capfd):
    words = {"download": "me/original", "gpu": "nodes"}.get(verb, GOOD[verb])
    assert main(arguments(verb, words, place, "--device", "cuda")) == 3
    out, err = capfd.readouterr()
    assert out == "" and "the processor" in one_sentence(err)


@pytest.mark.parametrize("words, code", [
    (["models", "--json"], 0), (["models", "--help"], 0), (["--help"], 0), ([], 2), (["dance"], 2),
    (["delete", "nothing", "--json"], 2), (["delete", "--json"], 2)])
def test_the_process_ends_with_the_code(words, code, tmp_path, repository):
    more = ["--data", str(tmp_path)] if words and words[0] in VERBS else []
    done = subprocess.run([sys.executable, "-m", "engine", *words, *more], cwd=repository, capture_output=True,
                          text=True)
    assert done.returncode == code, done.stderr
    if "--json" in words:
        assert done.stdout == ("" if code else '{"models": []}\n')
