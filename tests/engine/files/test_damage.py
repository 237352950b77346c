"""A small compressed folder, damaged in 160 ways with fixed seeds: a sentence or the same text, never other text.

One program opens them all, and at the end the good folder answers as it did at first.
"""
from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from engine import Engine, Options, Sampling, UserError
from engine.files import proof
from engine.files.compressed import ExpertsFile
from engine.files.manifest import CHANGEABLE, experts_name
from tests.support import small_model

QUESTION = [{"role": "user", "content": "Tell me a story about a dog and a boat."}]
WEIGHTS = ("trunk.safetensors", experts_name(0), experts_name(1))
TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "floe.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory, repository) -> tuple[Path, Path]:
    """The folder, and another of the same shape with other weights."""
    here = tmp_path_factory.mktemp("damage")
    good = small_model.make(here / "one", repository / "assets" / "demo")[1]
    return good, small_model.make(here / "two", repository / "assets" / "demo", seed=1)[1]


def opened(folder: Path) -> tuple[str, list[str]]:
    """What the model says, and the sentences while it was opened and used."""
    said = []
    with Engine.open(folder, Options("exact", device="cpu"), lambda text, share: said.append(text)) as engine:
        events = list(engine.chat(QUESTION, Sampling(temperature=0, max_tokens=8)))
        if events[-1].reason == "error":
            raise UserError(events[-1].text)
        assert engine.snapshot()["note"] in ("", *said)
        return "".join(event.text for event in events[:-1]), said
    raise AssertionError


# --- ways to damage a folder: each takes the folder, the other one, and the dice --------------------------------------
def flip(folder: Path, other: Path, dice: random.Random, names=WEIGHTS + TEXTS) -> None:
    path = folder / dice.choice(names)
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def flip_text(folder: Path, other: Path, dice: random.Random) -> None:
    flip(folder, other, dice, TEXTS)


def zeros(folder: Path, other: Path, dice: random.Random) -> None:
    path = folder / dice.choice(WEIGHTS)
    data = bytearray(path.read_bytes())
    at = dice.randrange(len(data))
    data[at:at + 4096] = bytes(len(data[at:at + 4096]))
    path.write_bytes(data)


def cut(folder: Path, other: Path, dice: random.Random) -> None:
    path = folder / dice.choice(WEIGHTS + TEXTS)
    os.truncate(path, dice.randrange(path.stat().st_size))


def lost(folder: Path, other: Path, dice: random.Random) -> None:
    (folder / dice.choice(WEIGHTS + TEXTS)).unlink()


def layers_swapped(folder: Path, other: Path, dice: random.Random) -> None:
    (folder / experts_name(0)).rename(folder / "x")
    (folder / experts_name(1)).rename(folder / experts_name(0))
    (folder / "x").rename(folder / experts_name(1))


def experts_swapped(folder: Path, other: Path, dice: random.Random) -> None:
    """Two experts of a layer change places, each with its checksum."""
    path = folder / experts_name(dice.randrange(2))
    file, data = ExpertsFile(path), bytearray(path.read_bytes())
    a, b = dice.sample(range(small_model.EXPERTS), 2)
    for at, size in ((file.blobs_at, file.blobs.shape[1]),
                     (file.start + file.header["checksums"]["data_offsets"][0], 8)):
        one, two = slice(at + a * size, at + (a + 1) * size), slice(at + b * size, at + (b + 1) * size)
        data[one], data[two] = data[two], data[one]
    path.write_bytes(data)


def of_another(folder: Path, other: Path, dice: random.Random) -> None:
    """A file of another model with the same numbers."""
    name = dice.choice((*WEIGHTS, "floe.json"))
    shutil.copyfile(other / name, folder / name)


def number(folder: Path, other: Path, dice: random.Random) -> None:
    """Another number somewhere in a JSON file."""
    path = folder / dice.choice(("config.json", "floe.json", "tokenizer_config.json"))
    raw = json.loads(path.read_text())
    key = dice.choice([key for key in raw if key != "checksum"])
    raw[key] = raw[key] + dice.choice((-1, 1)) if type(raw[key]) is int else dice.choice((None, 3, "x", [], {}, True))
    path.write_text(json.dumps(raw))


def words(folder: Path, other: Path, dice: random.Random) -> None:
    """Two words of the vocabulary change places."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    a, b = dice.sample(sorted(vocabulary), 2)
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def added(folder: Path, other: Path, dice: random.Random) -> None:
    """A file that the model was not made with, but that is read where it is."""
    name, text = dice.choice((("generation_config.json", '{"eos_token_id": 5, "temperature": 9.0, "do_sample": true}'),
                              ("chat_template.json", '{"chat_template": "no"}'),
                              ("added_tokens.json", '{"dog": 7}'), ("special_tokens_map.json", '{"eos_token": "a"}'),
                              ("vocab.json", '{"a": 0}'), ("tokenizer.model", "x")))
    (folder / name).write_text(text)


WAYS = (flip, flip_text, zeros, cut, lost, layers_swapped, experts_swapped, of_another, number, words, added)


def outcome(folder: Path, expected: str) -> str:
    """"refused", "noted" or "same"; anything else is a failure of the test."""
    try:
        text, said = opened(folder)
    except UserError as error:
        assert str(error).endswith(".") and "\n" not in str(error) and len(str(error)) < 400, error
        return "refused"
    if any(name in line for line in said for name in CHANGEABLE):
        return "noted"
    assert text == expected
    return "same"


@pytest.mark.slow
@pytest.mark.parametrize("small", [proof.SMALL, 0])
def test_no_damage_is_silent(made, tmp_path, monkeypatch, small):
    """small 0: every file is one of the large ones, proved once and noted; it changes behind the note."""
    good, other = made
    monkeypatch.setattr(proof, "SMALL", small)
    expected, said = opened(good)
    assert expected and not any(name in line for line in said for name in CHANGEABLE)
    found = []
    for seed in range(160 if small else 40):
        dice = random.Random(seed)
        folder = shutil.copytree(good, tmp_path / "model")
        if not small:
            assert outcome(folder, expected) == "same" and (folder / proof.NOTES).is_file()
        way = WAYS[seed % len(WAYS)]
        way(folder, other, dice)
        try:
            found.append(outcome(folder, expected))
        except BaseException as error:
            raise AssertionError(f"{way.__name__}, seed {seed}") from error
        shutil.rmtree(folder)
    assert found.count("refused") > 0.7 * len(found)
    assert opened(good)[0] == expected
