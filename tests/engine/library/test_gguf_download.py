"""GGUF files from a Hub: found, fetched, imported, with the original's configuration; tokenizers out of the file."""
from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from transformers import AutoTokenizer

from engine.__main__ import main
from engine.core import MachineError, UserError
from engine.files.chat_parts import LFS
from engine.files.gguf.names import MODEL_TYPES
from engine.files.gguf.tokenizer import completed, rebuild_tokenizer
from engine.files.manifest import Manifest, experts_name
from engine.library import catalogue, gguf_import
from engine.library.download import download
from engine.library.gguf_import import import_gguf
from engine.library.hub import Hub, Stopped
from engine.library.installed import Source, models, unfinished
from engine.library.transfer import CompressOptions, part_of
from tests.support.architectures import build
from tests.support.folders import next_logits
from tests.support.killed import CHUNK, Nursery
from tests.support.loopback_hub import LoopbackHub, status

gguf = pytest.importorskip("gguf")
from engine.files.gguf.header import read_header  # noqa: E402
from tests.support.gguf_files import add_tokenizer, finish, like, write  # noqa: E402

SHAPE = dict(num_hidden_layers=4, moe_intermediate_size=64, num_experts=4)
REPO, ORIGINAL = "me/Model-GGUF", "me/Model"
CPU = CompressOptions(16, "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """gguf: the file; like: configuration and tokenizer of the original; once: what an import makes of it."""
    folder = tmp_path_factory.mktemp("made")
    model = build("qwen3_moe", **SHAPE)
    (path,) = write(folder / "Model-Q8_0.gguf", "qwen3_moe", model, "Q8_0")
    original = like(folder / "like", model)
    import_gguf(path, folder / "once", original, device="cpu")
    return {"gguf": path, "like": original, "once": folder / "once"}


@pytest.fixture
def loopback(made, monkeypatch):
    with LoopbackHub() as hub:
        hub.add(REPO, {made["gguf"].name: made["gguf"].read_bytes(), "README.md": b"# files", "mmproj-x.gguf": b"eye"})
        hub.add_folder(ORIGINAL, made["like"])
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def assert_imported(folder: Path, made: dict[str, Path]) -> None:
    found, expected = Manifest.load(folder), Manifest.load(made["once"])
    found.check_sizes(folder)
    assert found == expected
    for layer in range(expected.layers):
        assert (folder / experts_name(layer)).read_bytes() == (made["once"] / experts_name(layer)).read_bytes()
    names = {path.name for path in folder.iterdir()} - {"floe.source.json"}
    assert names == {path.name for path in made["once"].iterdir()}


def gguf_bytes(loopback: LoopbackHub) -> int:
    return sum(n for name, n in loopback.served.items() if name.endswith(".gguf"))


# --- whose configuration -------------------------------------------------------------------------------------------
def test_the_card_of_the_repository_names_the_original(loopback, made, tmp_path):
    loopback.cards[REPO] = {"base_model": [ORIGINAL]}
    texts = []
    folder = download(REPO, data=tmp_path, choice=CPU, report=lambda progress: texts.append(progress.text))
    assert_imported(folder, made)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["Model-GGUF"]
    assert Source.load(folder).kind == "gguf" and gguf_bytes(loopback) == made["gguf"].stat().st_size
    assert any("stored as Q8_0 and are quantised a second time" in text for text in texts)
    assert "Compressing layer 4 of 4" in texts


def test_the_repository_itself_may_have_it(loopback, made, tmp_path):
    files = {path.name: path.read_bytes() for path in made["like"].iterdir()}
    loopback.add(REPO, files | {made["gguf"].name: made["gguf"].read_bytes()})
    del loopback.repositories[ORIGINAL]
    assert_imported(download(REPO, data=tmp_path, choice=CPU), made)


@pytest.mark.parametrize("place", ["hub", "folder"])
def test_the_user_may_name_it(loopback, made, tmp_path, place):
    named = ORIGINAL if place == "hub" else str(made["like"])
    assert_imported(download(REPO, "gguf", data=tmp_path, choice=CPU, like=named), made)


def test_nobody_names_it(loopback, made, tmp_path, monkeypatch):
    """Of a file that does not say enough no more comes than that takes; where a card names another model, nothing."""
    monkeypatch.setattr(gguf_import, "FIRST_LOOK", 1 << 10)
    with pytest.raises(UserError, match="^Model-Q8_0.gguf cannot be imported by itself .*name the original model"):
        download(REPO, data=tmp_path, choice=CPU)
    assert 0 < gguf_bytes(loopback) < made["gguf"].stat().st_size / 2 and os.listdir(tmp_path / "models") == []
    loopback.served.clear()
    loopback.cards[REPO] = {"base_model": "me/Weights"}
    loopback.add("me/Weights", {"model.safetensors": b"x"})
    with pytest.raises(UserError, match="me/Weights has no config.json; name the original model"):
        download(REPO, data=tmp_path, choice=CPU)
    assert not gguf_bytes(loopback) and os.listdir(tmp_path / "models") == []


def test_files_that_say_all_of_their_model_need_no_original(loopback, demo_checkpoint, tmp_path, monkeypatch):
    """In parts, of which the last ones hold the head; stopped on the way, no network any more once all are here."""
    monkeypatch.setattr(gguf_import, "FIRST_LOOK", 1 << 10)
    model = build("qwen3_moe", vocab_size=4096, norm_topk_prob=True, tie_word_embeddings=False, **SHAPE)
    (whole,) = write(tmp_path / "whole.gguf", "qwen3_moe", model, "Q8_0", demo_checkpoint)
    parts = write(tmp_path / "Alone-Q8_0.gguf", "qwen3_moe", model, "Q8_0", demo_checkpoint, part_bytes=400_000)
    loopback.add("me/Alone-GGUF", {path.name: path.read_bytes() for path in parts})
    stop = Event()

    def late(progress) -> None:
        if progress.text.startswith("Reading"):
            stop.set()
    with pytest.raises(Stopped):
        download("me/Alone-GGUF", data=tmp_path, choice=CPU, report=late, stop=stop)
    folder = download("me/Alone-GGUF", data=tmp_path, choice=CPU, hub=Hub("http://127.0.0.1:9", delays=()))
    import_gguf(whole, tmp_path / "local", device="cpu")
    found, expected = Manifest.load(folder), Manifest.load(tmp_path / "local")
    assert len(parts) > 2 and found.files == expected.files
    assert sum(path.stat().st_size for path in parts) == gguf_bytes(loopback)


def test_a_tensor_without_a_place_is_refused_before_the_rest_of_its_file_comes(loopback, demo_checkpoint, tmp_path,
                                                                             monkeypatch):
    monkeypatch.setattr(gguf_import, "FIRST_LOOK", 1 << 10)
    model = build("qwen3_moe", vocab_size=4096, norm_topk_prob=True, **SHAPE)
    (path,) = write(tmp_path / "m.gguf", "qwen3_moe", model, tokenizer=demo_checkpoint, beside="rope_freqs.weight")
    loopback.add("me/Alone-GGUF", {path.name: path.read_bytes()})
    with pytest.raises(UserError, match="^m.gguf cannot be imported by itself .rope_freqs.weight is not known here"):
        download("me/Alone-GGUF", data=tmp_path, choice=CPU)
    assert gguf_bytes(loopback) < path.stat().st_size / 2 and os.listdir(tmp_path / "models") == []


@pytest.mark.parametrize("lacking, said", [
    ("tokenizer.json", r"The tokenizer in Model-Q8_0.gguf cannot be rebuilt .*: none, none"),
    ("chat_template.jinja", "Neither Model-Q8_0.gguf nor its original has a chat template")])
def test_what_nobody_could_talk_to_is_refused_when_its_beginning_is_here(loopback, made, tmp_path, monkeypatch, lacking,
                                                                       said):
    monkeypatch.setattr(gguf_import, "FIRST_LOOK", 1 << 10)
    loopback.cards[REPO] = {"base_model": [ORIGINAL]}
    loopback.add(ORIGINAL, {path.name: path.read_bytes() for path in made["like"].iterdir() if path.name != lacking})
    with pytest.raises(UserError, match=said):
        download(REPO, data=tmp_path, choice=CPU, hub=Hub(loopback.endpoint, chunk_bytes=CHUNK))
    assert os.listdir(tmp_path / "models") == []
    assert gguf_bytes(loopback) < made["gguf"].stat().st_size / 2


def test_the_note_of_git_lfs_in_place_of_a_file_is_named(loopback, made, tmp_path):
    loopback.cards[REPO] = {"base_model": [ORIGINAL]}
    loopback.add(REPO, {made["gguf"].name: LFS + b"v1\noid sha256:0\nsize 7000000\n"})
    with pytest.raises(UserError, match=f"{made['gguf'].name} is not there, only the note of Git LFS"):
        download(REPO, data=tmp_path, choice=CPU)


def test_a_name_of_the_catalogue_takes_its_file_out_of_a_folder_in_parts(loopback, made, tmp_path, monkeypatch):
    parts = write(tmp_path / "Model-Q8_0.gguf", "qwen3_moe", build("qwen3_moe", **SHAPE), "Q8_0", part_bytes=100_000)
    files = {f"Q8_0/{path.name}": path.read_bytes() for path in parts} | {"Model-Q4_0.gguf": b"x"}
    loopback.add(REPO, files)
    entry = replace(next(iter(catalogue.entries().values())), name="model", title="A Model", repository=ORIGINAL,
                    gguf_repository=REPO, gguf_file=f"Q8_0/{parts[0].name}")
    monkeypatch.setattr(catalogue, "entries", lambda: {entry.name: entry})
    folder = download("A Model", "gguf", data=tmp_path, choice=CPU)
    assert len(parts) > 2 and folder.name == "model"
    assert Manifest.load(folder).files[:-1] == Manifest.load(made["once"]).files[:-1]


@pytest.mark.parametrize("name", [name for name, entry in catalogue.entries().items() if entry.gguf_repository])
def test_what_the_catalogue_offers_as_gguf_can_be_imported(name):
    config = catalogue.entries()[name].config
    assert config.get("text_config", config)["model_type"] in MODEL_TYPES


def test_several_files_want_a_name_and_lacking_parts_are_noticed(loopback, tmp_path):
    names = ["a-Q4_K_M.gguf", "a-Q8_0-00001-of-00011.gguf", *(f"b/c-{i:05d}-of-00012.gguf" for i in range(1, 13))]
    loopback.add(REPO, {name: b"GGUF" for name in names})
    with pytest.raises(UserError, match=r"offers these GGUF files: a-Q4_K_M.gguf, a-Q8_0-00001.*name one with --file"):
        download(REPO, data=tmp_path)
    with pytest.raises(UserError, match="d.gguf is not among them"):
        download(REPO, data=tmp_path, file="d.gguf")
    with pytest.raises(UserError, match="holds 1 of the 11 parts of a-Q8_0"):
        download(REPO, data=tmp_path, file="a-Q8_0-00001-of-00011.gguf")
    for name in ("b/c-00011-of-00012.gguf", "c-00001-of-00012.gguf", "c.gguf"):
        with pytest.raises(UserError, match="damaged or incomplete"):       # it was found, and looked at
            download(REPO, data=tmp_path, file=name)
    assert part_of("b/c-00011-of-00012.gguf") == ("b/c", 11, 12) and part_of("c-1-of-2.gguf") is None


# --- refused before the long download ------------------------------------------------------------------------------
def test_an_architecture_that_is_not_imported_costs_no_download(loopback, tmp_path):
    loopback.cards[REPO] = {"base_model": ORIGINAL}
    build("jamba").config.save_pretrained(tmp_path / "phi")
    loopback.add_folder(ORIGINAL, tmp_path / "phi")
    with pytest.raises(UserError, match="files of jamba models are not imported"):
        download(REPO, data=tmp_path, choice=CPU)
    assert not gguf_bytes(loopback) and os.listdir(tmp_path / "models") == []


def test_the_disk_must_hold_the_file_and_the_result(loopback, made, tmp_path, monkeypatch):
    loopback.cards[REPO] = {"base_model": ORIGINAL}
    usage, file_bytes = shutil.disk_usage(tmp_path), made["gguf"].stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=200_000_000 + file_bytes + 1000))
    with pytest.raises(UserError, match="MB are needed; make room"):
        download(REPO, data=tmp_path, choice=CPU)
    assert not gguf_bytes(loopback) and os.listdir(tmp_path / "models") == []


def test_without_the_package_nothing_is_fetched(loopback, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        download(REPO, data=tmp_path)
    assert not gguf_bytes(loopback)


# --- stopped, broken, killed ---------------------------------------------------------------------------------------
def test_a_pause_anywhere_goes_on(loopback, made, tmp_path):
    """Stopped at every piece of news in turn; what lies on the disk needs no network any more."""
    loopback.cards[REPO] = {"base_model": ORIGINAL}
    hub, stops = Hub(loopback.endpoint, chunk_bytes=CHUNK), 0
    for n in range(40):
        stop, news = Event(), []

        def report(progress, n=n, stop=stop, news=news) -> None:
            news.append(progress.text)
            if len(news) > n // 2:
                stop.set()
        try:
            folder = download(REPO, data=tmp_path, choice=CPU, hub=hub, report=report, stop=stop)
            break
        except Stopped:
            stops += 1
            assert [model.kind for model in models(tmp_path)] == ["unfinished"]
            if (unfinished(tmp_path / "models" / "Model-GGUF") / made["gguf"].name).is_file():
                hub = Hub("http://127.0.0.1:9", delays=())
    assert stops > 3 and hub.endpoint.endswith(":9")
    assert_imported(folder, made)
    assert gguf_bytes(loopback) <= made["gguf"].stat().st_size + stops * CHUNK


def test_a_hub_that_fails_leaves_a_download_to_go_on_with(loopback, made, tmp_path):
    loopback.cards[REPO] = {"base_model": ORIGINAL}
    loopback.fault(made["gguf"].name, *[status(500)] * 9)
    with pytest.raises(MachineError, match="goes on where it was"):
        download(REPO, data=tmp_path, choice=CPU, hub=Hub(loopback.endpoint, delays=(0.01,)))
    loopback.faults.clear()
    assert_imported(download(REPO, data=tmp_path, choice=CPU), made)


def test_a_disk_that_fills_up_meanwhile(loopback, made, tmp_path):
    """A limit on the size of files makes the system refuse the second layer, as a full disk does."""
    loopback.cards[REPO], before = {"base_model": ORIGINAL}, resource.getrlimit(resource.RLIMIT_FSIZE)

    def report(progress) -> None:
        if progress.text == "Compressing layer 2 of 4":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(MachineError, match="cannot hold a file of that size"):
            download(REPO, data=tmp_path, choice=CPU, report=report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    work = unfinished(tmp_path / "models" / "Model-GGUF")
    assert (work / "made" / experts_name(0)).is_file() and not (work / "made" / experts_name(1)).exists()
    assert_imported(download(REPO, data=tmp_path, choice=CPU), made)
    assert gguf_bytes(loopback) == made["gguf"].stat().st_size


@pytest.mark.slow
def test_killed_at_twenty_points(loopback, made, tmp_path):
    """While fetching, while compressing, while the trunk is written: never a half file, one chunk twice at most."""
    loopback.cards[REPO] = {"base_model": ORIGINAL}
    loopback.pause, loopback.piece = 0.002, 8 << 10
    rng, dest = random.Random(7), tmp_path / "model"

    def somewhere() -> Callable[[], bool]:
        delay = 0.02 + rng.random() * 0.35
        return lambda: not Event().wait(delay)
    with Nursery("engine.library.gguf_import", "huggingface_hub.hf_api", "gguf", "gguf.quants",
                 "transformers.models.qwen3_moe.modeling_qwen3_moe") as nursery:
        whole = nursery.killed_often(20, somewhere, loopback, lambda folder: assert_imported(folder, made), dest,
                                     model=REPO, trunk_bits=16, device="cpu")
    assert_imported(download(REPO, folder=dest, choice=CPU), made)
    assert torch.equal(next_logits(dest), next_logits(made["once"]))
    assert gguf_bytes(loopback) <= (whole + 1) * made["gguf"].stat().st_size + 20 * CHUNK


# --- the tokenizer in the file -------------------------------------------------------------------------------------
def vocabulary_file(path: Path, tokenizer: Path, split: str = "gpt-2") -> Path:
    writer = gguf.GGUFWriter(path, "qwen3moe")
    add_tokenizer(writer, tokenizer, split)
    writer.add_tensor("x", __import__("numpy").zeros((2, 2), "float32"))
    finish(writer)
    return path


def texts_of(file: Path) -> dict[str, str]:
    return read_header(file).texts


def test_a_tokenizer_out_of_the_file_is_the_original_s(demo_checkpoint, tmp_path):
    file = vocabulary_file(tmp_path / "v.gguf", demo_checkpoint)
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text("{}")
    folder = completed(tmp_path / "like", file, texts_of(file), tmp_path / "made")
    assert folder == tmp_path / "made" and os.listdir(tmp_path / "like") == ["config.json"]
    found, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(demo_checkpoint)
    for words in ("Hello, it's 1234 times\n\n   more!", "Ünïcödé — 漢字 🦀", "<|im_start|>user\nHi<|im_end|>", " a  b"):
        assert found(words).input_ids == original(words).input_ids
        assert found.decode(found(words).input_ids) == words
    assert found.eos_token == original.eos_token and len(found) == len(original)
    messages = [{"role": "user", "content": "Hi"}]
    assert found.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(messages, tokenize=False)


def test_the_original_s_own_tokenizer_and_template_come_first(demo_checkpoint, made, tmp_path):
    file = vocabulary_file(tmp_path / "v.gguf", demo_checkpoint)
    whole = tmp_path / "whole"
    shutil.copytree(made["like"], whole)
    (whole / "chat_template.jinja").write_text("mine")
    assert completed(whole, file, texts_of(file), tmp_path / "a") == whole
    shutil.copytree(made["like"], tmp_path / "mute", ignore=shutil.ignore_patterns("chat_template.jinja"))
    folder = completed(tmp_path / "mute", file, texts_of(file), tmp_path / "b")     # a tokenizer, but no template
    assert (folder / "tokenizer.json").read_bytes() == (made["like"] / "tokenizer.json").read_bytes()
    assert "im_start" in (folder / "chat_template.jinja").read_text() and (folder / "config.json").is_file()


@pytest.mark.parametrize("split", ["glm4", "deepseek-llm", "default"])
def test_a_split_that_nobody_here_knows_is_not_guessed(demo_checkpoint, tmp_path, split):
    file = vocabulary_file(tmp_path / "v.gguf", demo_checkpoint, split)
    with pytest.raises(UserError, match=f"cannot be rebuilt .*: gpt2, {split}.; name the original model"):
        rebuild_tokenizer(file, texts_of(file), tmp_path)


def test_a_file_without_a_vocabulary(made, tmp_path):
    with pytest.raises(UserError, match="cannot be rebuilt .*how text is split: none, none"):
        rebuild_tokenizer(made["gguf"], texts_of(made["gguf"]), tmp_path)


# --- the verbs -----------------------------------------------------------------------------------------------------
def test_import_verb(made, tmp_path, capsys):
    shutil.copyfile(made["gguf"], tmp_path / "m.gguf")
    assert main(["import_gguf", str(tmp_path / "m.gguf"), str(tmp_path / "a"), "--device", "cpu"]) == 2
    assert "by itself (it does not say enough of how text is split: none, none); name" in capsys.readouterr().err
    words = ["import_gguf", str(tmp_path / "m.gguf"), str(tmp_path / "a"), "--device", "cpu", "--json"]
    assert main([*words, "--like", str(made["like"])]) == 0
    out = capsys.readouterr()
    document = json.loads(out.out)
    assert document["experts_stored_as"] == ["Q8_0"] and document["layers"] == 4
    assert set(document["added_error"]) == {"gate", "up", "down"} and "layer 5/5" in out.err
    for path in made["like"].iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    assert main(["import_gguf", str(tmp_path / "m.gguf"), str(tmp_path / "b"), "--device", "cpu"]) == 0


def test_import_verb_fetches_the_original_s_small_files(loopback, made, tmp_path, capsys):
    words = ["import_gguf", str(made["gguf"]), str(tmp_path / "a"), "--device", "cpu", "--like", ORIGINAL]
    assert main(words) == 0
    assert_imported(tmp_path / "a", made)
    assert not any(name.endswith((".gguf", ".safetensors")) for name in loopback.served)


def test_download_verb(loopback, made, tmp_path, capsys):
    words = ["download", REPO, "--source", "gguf", "--file", made["gguf"].name, "--like", ORIGINAL, "--device", "cpu",
             "--trunk-bits", "16", "--data", str(tmp_path), "--json"]
    assert main(words) == 0
    assert_imported(Path(json.loads(capsys.readouterr().out)["folder"]), made)
