"""Codes compensated over a text: truer than those without, the same after any stop, from every kind of original."""
from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.__main__ import main
from engine.core import Options, UserError
from engine.files.compressed import ExpertsFile
from engine.files.manifest import TRUNK, Manifest, experts_name
from engine.library.compress import compress
from engine.library.hub import Stopped
from engine.library.requantize import requantize
from engine.model.gradients import felt
from engine.model.load import load
from engine.quality.loss_probe import Sums, log_probabilities
from engine.quality.requantize import Text
from tests.support import folders, gguf_files
from tests.support.loopback_hub import LoopbackHub

NAMES = ("qwen3_moe", "gpt_oss", "deepseek_v2", "gemma4_text")  # plain; biased, transposed, windows; dense first; norms
Tensor = torch.Tensor


def checkpoint(name: str, folder: Path, **changes) -> torch.nn.Module:
    model = folders.checkpoint(name, folder, hidden_size=128, **changes)
    folders.write_tokenizer(folder, apart=True)
    return model


def words(path: Path, seed: int, n_documents: int, n: int = 60) -> Path:
    """Documents of random words, in each of which few different ones occur."""
    chance = random.Random(seed)
    documents = [" ".join(f"w{chance.choice(few)}" for _ in range(n)) for _ in range(n_documents)
                 for few in [chance.sample(range(3, 128), 12)]]
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Text:
    return Text((words(tmp_path_factory.mktemp("text") / "words.txt", 0, 40),), 2400)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    checkpoint("qwen3_moe", folder, num_hidden_layers=3)
    (folder / "chat_template.jinja").write_text("{{ messages }}")       # without one nobody could talk to a download
    return folder


@pytest.fixture(scope="module")
def made(source, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "made"
    compress(source, folder, trunk_bits=4, device="cpu", text=text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "floe.source.json"}


def divergence(folder: Path, model: torch.nn.Module, text: Text) -> float:
    """Nats a token at level `exact`."""
    found, sums = load(folder, Options(level="exact", device="cpu", predict=False)), Sums()
    with torch.inference_mode():
        for ids in text.documents(folder):
            sums.add(log_probabilities(found.model, ids), log_probabilities(model, ids), ids[0, 1:])
    return sums.figures()["kl"]


@pytest.mark.parametrize("name", NAMES)
def test_less_is_lost_on_other_texts_of_the_kind(name, text, tmp_path):
    """Random weights, whose inputs have little structure: a fifth at least, all of the model's parts at 4 bits."""
    model = checkpoint(name, tmp_path / "source")
    other = Text((words(tmp_path / "other.txt", 1, 10),), 600)
    compress(tmp_path / "source", tmp_path / "plain", trunk_bits=4, device="cpu")
    compress(tmp_path / "source", tmp_path / "made", trunk_bits=4, device="cpu", text=text)
    assert divergence(tmp_path / "made", model, other) < 0.8 * divergence(tmp_path / "plain", model, other)
    assert contents(tmp_path / "made").keys() == contents(tmp_path / "plain").keys()
    sizes = [{entry.path: entry.bytes for entry in Manifest.load(tmp_path / made).files if "safetensors" in entry.path}
             for made in ("made", "plain")]
    assert sizes[0] == sizes[1]


def test_what_is_felt_are_the_gradients_of_its_own_next_tokens(source, text):
    """Against transformers' own model of the same weights."""
    few = [*text.documents(source)[:4], torch.tensor([[5, 7, 5]])]      # so few tokens are a step to a runtime
    found = load(source, Options(level="full", device="cpu", predict=False))
    with torch.inference_mode():
        felt_by_ours = felt(found.model, found.runtime, few, lambda: None)
    model, draw, given = AutoModelForCausalLM.from_pretrained(source), torch.Generator().manual_seed(0), []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(lambda module, _, out: given.append(out))
    wanted, n_tokens = torch.zeros_like(felt_by_ours), 0
    for ids in few:
        given.clear()
        logits = model(ids).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        loss = -logits.log_softmax(-1)[range(len(drawn)), drawn].sum()
        for sums, own in zip(wanted, torch.autograd.grad(loss, given), strict=True):
            sums += own.flatten(0, -2).T @ own.flatten(0, -2)
        n_tokens += len(drawn)
    torch.testing.assert_close(felt_by_ours.clone(), wanted / n_tokens, rtol=1e-3, atol=1e-6 * float(wanted.max()))


def test_an_expert_without_tokens_keeps_what_it_had(source, tmp_path):
    """Three tokens reach six of eight experts at most."""
    few = Text((words(tmp_path / "few.txt", 2, 1, 3),), 2)
    compress(source, tmp_path / "plain", device="cpu")
    compress(source, tmp_path / "made", device="cpu", text=few)
    plain, found = (ExpertsFile(tmp_path / made / experts_name(0)).blobs for made in ("plain", "made"))
    same = [torch.equal(*pair) for pair in zip(plain, found, strict=True)]
    assert 2 <= sum(same) < len(same)


def test_stopped_anywhere_it_ends_in_the_same_bytes(source, text, made, tmp_path):
    """Ten times in one run, at moments that a seed chooses."""
    chance, stops, looked = random.Random(4), 0, 0

    def check() -> None:
        nonlocal left, looked
        left, looked = left - 1, looked + 1
        if left == 0:
            raise Stopped
    while True:
        left = chance.randrange(1, 150) if stops < 10 else -1
        try:
            compress(source, tmp_path / "made", trunk_bits=4, device="cpu", check=check, text=text)
            break
        except Stopped:
            stops += 1
    assert stops == 10 and looked > 400 and contents(tmp_path / "made") == contents(made)


def test_it_does_not_go_on_with_another_text(source, text, tmp_path):
    def check() -> None:
        raise Stopped
    with pytest.raises(Stopped):
        compress(source, tmp_path / "made", device="cpu", check=check, text=text)
    with pytest.raises(UserError, match="begun with other settings"):
        compress(source, tmp_path / "made", device="cpu")


def test_its_cost_is_said_before(source, text, tmp_path):
    said = []

    def check() -> None:
        raise Stopped
    with pytest.raises(Stopped):
        compress(source, tmp_path / "made", device="cpu", report=said.append, check=check, text=text)
    assert "go through 3 layers and 24 experts: about" in said[0].text and len(said) == 2


# --- a folder made again ---------------------------------------------------------------------------------------------
def test_calibrate_makes_the_codes_again_and_measures_them(source, text, tmp_path, capsys):
    """The same ones as at one go, though it was stopped within the second layer before."""
    folder, again = tmp_path / "model", tmp_path / "model-again"
    compress(source, folder, trunk_bits=4, device="cpu")
    old = contents(folder)
    argv = ["calibrate", str(folder), "--original", str(source), "--text", str(text.paths[0]), "--tokens", "240",
            "--device", "cpu"]

    def check() -> None:
        if (again / experts_name(0)).is_file():
            raise Stopped
    with pytest.raises(Stopped):
        requantize(folder, str(source), Text(text.paths, 240), "cpu", check=check)
    assert contents(folder) == old and main(argv) == 0
    compress(source, tmp_path / "plain", trunk_bits=4, device="cpu")
    compress(source, tmp_path / "straight", trunk_bits=4, device="cpu", text=Text(text.paths, 240, tmp_path / "plain"))
    shutil.rmtree(tmp_path / "plain")
    manifest = Manifest.load(folder)
    assert set(manifest.levels) == {"exact", "quality", "balanced", "fast", "floe"}
    for name in (TRUNK, experts_name(0)):
        assert contents(folder)[name] == contents(tmp_path / "straight")[name] != old[name]
    capsys.readouterr()
    assert main(argv) == 0 and "are those of this text already" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["model", "straight"] and not again.exists()


@pytest.mark.parametrize("kind", ["hub", "gguf"])
def test_the_original_may_be_on_the_hub_or_a_gguf_file(kind, source, text, tmp_path, monkeypatch):
    """The same codes come out as from the folder, in the groups that the model has: 64, where 128 is the default."""
    few = Text(text.paths, 240)
    compress(source, tmp_path / "model", 64, 8, "cpu")
    compress(source, tmp_path / "straight", 64, 8, "cpu", text=replace(few, model=tmp_path / "model"))
    with LoopbackHub() as hub:
        hub.add_folder("me/Original", source)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        original = "me/Original" if kind == "hub" else str(tmp_path / "original.gguf")
        if kind == "gguf":
            gguf_files.write(Path(original), "qwen3_moe", AutoModelForCausalLM.from_pretrained(source))
        requantize(tmp_path / "model", original, few, "cpu", str(source))
    found, wanted = (contents(tmp_path / name) for name in ("model", "straight"))
    assert Manifest.load(tmp_path / "model").group_size == 64
    assert all(found[name] == wanted[name] for name in (TRUNK, *map(experts_name, range(3))))


@pytest.mark.parametrize("found", ["again", "before"])
def test_killed_between_the_two_renames(source, text, tmp_path, found):
    """`again`: the new folder waits for its name; `before`: only the old one is there."""
    folder, before, again = (tmp_path / name for name in ("model", "model-before", "model-again"))
    few = Text(text.paths, 240, before)
    compress(source, before, trunk_bits=4, device="cpu")
    compress(source, again, trunk_bits=4, device="cpu", text=few)
    wanted = contents(again)
    if found == "before":
        shutil.rmtree(again)
    requantize(folder, str(source), few, "cpu")
    assert contents(folder) == wanted and os.listdir(tmp_path) == ["model"]


def test_another_model_is_not_its_original(source, text, tmp_path):
    checkpoint("qwen3_moe", tmp_path / "other", num_hidden_layers=2)
    compress(source, tmp_path / "model", device="cpu")
    old = contents(tmp_path / "model")
    with pytest.raises(UserError, match="is not what .* was made from"):
        requantize(tmp_path / "model", str(tmp_path / "other"), text, "cpu")
    assert contents(tmp_path / "model") == old and sorted(os.listdir(tmp_path)) == ["model", "other"]

