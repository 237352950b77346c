"""Compress while downloading: the same folder as compress makes, little disk, and on again after any stop."""
from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import save_file

from engine.core import MachineError, UserError
from engine.files.chat_parts import LFS
from engine.files.compressed import MappedFile
from engine.files.manifest import INDEX, TRUNK, Manifest, experts_name
from engine.library.compress import compress
from engine.library.download import download
from engine.library.hub import Hub, Stopped
from engine.library.installed import Source, models, size_of, unfinished
from engine.library.transfer import CompressOptions
from engine.quality.requantize import Text
from tests.support.architectures import build
from tests.support.folders import next_logits, write_tokenizer
from tests.support.killed import CHUNK, Nursery
from tests.support.loopback_hub import LoopbackHub

NAME, TEMPLATE = "me/Small", "{{ messages }}"
SHAPE = dict(num_hidden_layers=10, vocab_size=512, hidden_size=128, moe_intermediate_size=64)
LEAN = CompressOptions(trunk_bits=16, device="cpu", keep_original=False)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A sharded checkpoint; the shards are the size of the trunk, roughly a layer and a half."""
    folder = tmp_path_factory.mktemp("original")
    build("qwen3_moe", **SHAPE).to(torch.bfloat16).save_pretrained(folder, max_shard_size="500KB")
    write_tokenizer(folder, apart=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


@pytest.fixture(scope="module")
def made(original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "made"
    compress(original, folder, trunk_bits=16, device="cpu")
    return folder


@pytest.fixture
def loopback(original, monkeypatch):
    with LoopbackHub() as hub:
        hub.add_folder(NAME, original)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def assert_same(found: Path, expected: Path) -> None:
    """Experts files byte by byte; the trunk tensor by tensor, its order is that of arrival."""
    a, b = Manifest.load(found), Manifest.load(expected)
    a.check_sizes(found)
    assert {entry.path for entry in a.files} == {entry.path for entry in b.files}
    for layer in range(b.layers):
        assert (found / experts_name(layer)).read_bytes() == (expected / experts_name(layer)).read_bytes()
    one, other = MappedFile(found / TRUNK), MappedFile(expected / TRUNK)
    assert one.header.keys() == other.header.keys()
    for key in one.header.keys() - {"__metadata__"}:
        assert torch.equal(one.tensor(key), other.tensor(key)), key
    names = {path.name for path in found.iterdir()} - {"floe.source.json"}
    assert names == {path.name for path in expected.iterdir()}


class Watch:
    """The most bytes that a folder has held, looked at all the time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.stop = folder, 0, Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self.stop.wait(0.0005):
            self.most = max(self.most, size_of(self.folder))

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop.set()
        self.thread.join()


def test_same_folder_as_compress_and_no_more_than_three_shards_beside_it(loopback, original, made, tmp_path):
    loopback.pause = 0.002
    texts = []
    with Watch(tmp_path) as watch:
        folder = download(NAME, folder=tmp_path / "Small", choice=LEAN, report=lambda progress: texts.append(progress))
    assert_same(folder, made)
    assert os.listdir(tmp_path) == ["Small"]
    shards = sorted((path.stat().st_size for path in original.glob("*.safetensors")), reverse=True)
    small = size_of(original) - sum(shards)
    assert watch.most <= size_of(folder) + sum(shards[:3]) + 2 * small
    assert watch.most < size_of(original)                       # else the bound above says nothing
    assert any("Compressing layer 10 of 10" in progress.text for progress in texts)
    assert texts[-1].done_bytes == texts[-1].total_bytes == size_of(original)
    assert sum(loopback.served.values()) == size_of(original)


def test_what_nobody_could_talk_to_is_refused_before_it_is_fetched(loopback, original, tmp_path):
    whole = {path.name: path.read_bytes() for path in original.iterdir()}
    bare = {name: data for name, data in whole.items() if name != "chat_template.jinja"}
    note = LFS + b"v1\noid sha256:0\nsize 7000000\n"
    shard = next(name for name in whole if name.endswith(".safetensors"))
    for files, said in (({name: data for name, data in whole.items() if name != "tokenizer.json"}, "has no tokenizer"),
                        (bare, "has no chat template"), (bare | {"tokenizer_config.json": b"{}"}, "no chat template"),
                        (whole | {"tokenizer.json": note}, "me/Mute/tokenizer.json is not there, only the note of Git"),
                        (whole | {shard: note}, f"me/Mute/{shard} is not there, only .*choose another source")):
        loopback.add("me/Mute", files)
        with pytest.raises(UserError, match=said):
            download("me/Mute", data=tmp_path, choice=LEAN)
        assert models(tmp_path) == [] and sum(loopback.served.values()) < 10_000


def test_the_original_stays_if_it_is_to_stay(loopback, original, made, tmp_path):
    folder = download(NAME, data=tmp_path, choice=CompressOptions(16, "cpu", keep_original=True))
    assert_same(folder, made)
    kept = tmp_path / "models" / "Small-original"
    assert {p.name: p.read_bytes() for p in kept.iterdir() if p.name != "floe.source.json"} == {
        p.name: p.read_bytes() for p in original.iterdir()}
    assert [(model.name, model.kind) for model in models(tmp_path)] == [("Small", "compressed"),
                                                                       ("Small-original", "checkpoint")]


def test_a_pause_anywhere_goes_on(loopback, made, tmp_path):
    """Stopped at every piece of news in turn: while fetching, while compressing, between the two."""
    dest = tmp_path / "Small"
    for n in range(1, 60):
        stop, news = Event(), []

        def report(progress, n=n, stop=stop, news=news) -> None:
            news.extend([progress.text] if progress.text else [])
            if len(news) > n % 7:
                stop.set()
        try:
            download(NAME, folder=dest, choice=LEAN, hub=Hub(loopback.endpoint, chunk_bytes=CHUNK), report=report,
                     stop=stop)
            break
        except Stopped:
            assert not dest.exists() and unfinished(dest).is_dir()
    assert n > 5
    assert_same(dest, made)


def test_over_a_text_while_it_arrives_paused_anywhere(loopback, original, tmp_path):
    """Twice, without the text and with it: layer after layer as the shards come, each of which goes when its layers are
    done; the walk goes on without."""
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(" ".join(f"w{(n * k) % 120}" for k in range(3, 20))
                                                               for n in range(1, 4)))
    texts = (tmp_path / "text.txt",)
    compress(original, tmp_path / "made", trunk_bits=16, device="cpu", text=Text(texts, 200))
    choice, hub = replace(LEAN, texts=texts, text_tokens=200), Hub(loopback.endpoint, chunk_bytes=CHUNK)
    for n in range(1, 100):
        stop, news = Event(), []

        def report(progress, n=n, stop=stop, news=news) -> None:
            news.extend([progress.text] if progress.text else [])
            if len(news) > 5 + n % 4:
                stop.set()
        try:
            download(NAME, folder=tmp_path / "Small", choice=choice, hub=hub, report=report, stop=stop)
            break
        except Stopped:
            assert len(list((unfinished(tmp_path / "Small") / "source").glob("*.safetensors"))) <= 4
    assert n > 3
    assert_same(tmp_path / "Small", tmp_path / "made")


@pytest.mark.parametrize("shards, is_copy", [(("embed", "lm_head"), False), (("lm_head", "embed"), False),
                                             (("lm_head", "embed"), True)])
def test_a_head_of_its_own_is_used_whatever_the_configuration_says(shards, is_copy, tmp_path, monkeypatch):
    """Head and embedding are in different shards, never here together; a mere copy is stored once."""
    source, said = tmp_path / "source", []
    model = build("ernie4_5_moe")
    assert model.config.tie_word_embeddings
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    if not is_copy:
        tensors["lm_head.weight"] = torch.randn(tensors["lm_head.weight"].shape)
    model.config.save_pretrained(source)
    write_tokenizer(source, apart=True)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    save_shards(tensors, source, shards)
    compress(source, tmp_path / "whole", trunk_bits=16, device="cpu")

    def full(source: Path, dest: Path) -> None:
        raise OSError(errno.ENOSPC, "no space")
    with LoopbackHub() as loopback:
        loopback.add_folder(NAME, source)
        dest, hub = tmp_path / "Small", Hub(loopback.endpoint)
        with monkeypatch.context() as context, pytest.raises(OSError):     # the trunk has its name, the rest is missing
            context.setattr("engine.files.folder_writer.copy_file", full)
            download(NAME, folder=dest, choice=LEAN, hub=hub, report=lambda progress: said.append(progress.text))
        download(NAME, folder=dest, choice=LEAN, hub=hub)
    assert_same(dest, tmp_path / "whole")
    assert torch.equal(next_logits(dest), next_logits(tmp_path / "whole"))
    assert json.loads((dest / "config.json").read_text())["tie_word_embeddings"] == is_copy
    assert sum("ties lm_head.weight to another tensor" in text for text in said) == (not is_copy)


def save_shards(tensors: dict[str, torch.Tensor], folder: Path, firsts: tuple[str, ...]) -> None:
    """One shard for each word of `firsts`, with the tensors that have it in their name; the last has the rest, too."""
    file_of = {name: f"model-{next((n for n, word in enumerate(firsts) if word in name), len(firsts) - 1)}.safetensors"
               for name in tensors}
    for file in set(file_of.values()):
        save_file({name: value for name, value in tensors.items() if file_of[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": file_of}))


def test_single_file_without_an_index(made, tmp_path):
    build("qwen3_moe", **SHAPE).to(torch.bfloat16).save_pretrained(tmp_path / "one")
    write_tokenizer(tmp_path / "one")
    (tmp_path / "one" / "chat_template.jinja").write_text(TEMPLATE)
    with LoopbackHub() as loopback:
        loopback.add_folder(NAME, tmp_path / "one")
        assert_same(download(NAME, folder=tmp_path / "Small", choice=LEAN, hub=Hub(loopback.endpoint)), made)


def test_disk_check_counts_the_result_and_the_shards_that_lie_together(loopback, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=204_000_000))
    with pytest.raises(UserError, match="needed; make room, let each part of the original be deleted"):
        download(NAME, data=tmp_path, choice=CompressOptions(16, "cpu"))
    assert not any(name.endswith(".safetensors") for name in loopback.served)


@pytest.mark.parametrize("when", ["Fetching model-00003", "Compressing layer 3"])
def test_a_disk_that_fills_up_meanwhile(loopback, original, made, tmp_path, when):
    """A limit on the size of files makes the system refuse writes, as a full disk does."""
    before, dest = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "Small"

    def report(progress) -> None:
        if progress.text.startswith(when):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(MachineError, match="cannot hold a file|cannot be written .File too large") as caught:
            download(NAME, folder=dest, choice=LEAN, hub=Hub(loopback.endpoint, chunk_bytes=CHUNK), report=report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value) and not dest.exists()
    assert_same(download(NAME, folder=dest, choice=LEAN), made)
    assert sum(loopback.served.values()) <= size_of(original) + 2 * CHUNK


def test_a_branch_that_moves_on_does_not_mix_shards(loopback, made, tmp_path):
    stop, dest = Event(), tmp_path / "Small"

    def report(progress) -> None:
        if progress.text.startswith("Compressing layer 2"):
            stop.set()
    with pytest.raises(Stopped):
        download(NAME, folder=dest, choice=LEAN, report=report, stop=stop)
    begun = Source.load(unfinished(dest)).commit
    build("qwen3_moe", seed=5, **SHAPE).to(torch.bfloat16).save_pretrained(tmp_path / "new", max_shard_size="500KB")
    assert loopback.add_folder(NAME, tmp_path / "new") != begun
    assert_same(download(NAME, folder=dest, choice=LEAN), made)
    assert Source.load(dest).commit == begun


def test_a_repository_that_lacks_a_shard(loopback, original, tmp_path):
    files = {path.name: path.read_bytes() for path in original.iterdir()}
    files.pop("model-00002-of-" + sorted(original.glob("*.safetensors"))[0].name[-17:])
    loopback.add(NAME, files)
    with pytest.raises(UserError, match="lacks model-00002-of-.*which its"):
        download(NAME, data=tmp_path, choice=LEAN)


@pytest.mark.slow
def test_killed_at_twenty_random_points(loopback, original, made, tmp_path):
    """kill -9, also while a layer is compressed or the trunk grows: no shard comes twice, nothing half is taken."""
    loopback.pause, loopback.piece = 0.002, 16 << 10
    dest, total, rng = tmp_path / "Small", size_of(original), random.Random(2)

    def served() -> int:
        return sum(loopback.served.values())

    def somewhere() -> Callable[[], bool]:
        goal, delay = served() + rng.randrange(total // 6), rng.random() * 0.3
        return lambda: served() > goal and not Event().wait(delay)
    with Nursery("engine.library.compress_stream", "huggingface_hub.hf_api",
                 "transformers.models.qwen3_moe.modeling_qwen3_moe",
                 "transformers.models.qwen3_moe.configuration_qwen3_moe") as nursery:
        whole = nursery.killed_often(20, somewhere, loopback, lambda folder: assert_same(folder, made), dest,
                                     model=NAME, trunk_bits=16, device="cpu", keep_original=False)
    assert_same(download(NAME, folder=dest, choice=LEAN), made)
    assert torch.equal(next_logits(dest), next_logits(made))
    assert served() <= (whole + 1) * total + 20 * CHUNK
