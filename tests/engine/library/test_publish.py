"""publish, and the whole way: published, picked from the catalogue, downloaded, opened, answering."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engine.core import MachineError, Options, Sampling, UserError
from engine.files.manifest import Manifest
from engine.library import catalogue
from engine.library.download import download
from engine.library.hub import Hub
from engine.library.installed import Source
from engine.library.publish import card, publish
from engine.library.transfer import CompressOptions
from tests.support.folders import compressed
from tests.support.loopback_hub import LoopbackHub, status
from tests.support.small_model import make

REPO = "me/Demo-Floe"


@pytest.fixture
def loopback(monkeypatch):
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return compressed("qwen3_moe", tmp_path_factory.mktemp("folder"))[2]


@pytest.fixture(scope="module")
def demo(repository) -> Path:
    found = repository / "assets" / "demo"
    if not (found / "floe.json").is_file():
        pytest.skip("the demonstration model is not in this checkout")
    return found


def answer(folder: Path) -> str:
    from engine.chat.engine import Engine
    engine = Engine.open(folder, Options(level="exact", device="cpu", context=128))
    try:
        events = list(engine.chat([{"role": "user", "content": "Hello!"}], Sampling(temperature=0.0, max_tokens=8)))
    finally:
        engine.close()
    assert events[-1].kind == "end" and events[-1].reason in ("stop", "length"), events[-1].text
    return "".join(event.text for event in events if event.kind in ("answer", "thinking"))


def test_the_demo_is_published_picked_by_name_downloaded_and_answers(loopback, demo, tmp_path, monkeypatch):
    publish(demo, REPO, Hub.here(token="hf_mine"))
    entry = replace(next(iter(catalogue.entries().values())), name="demo-published", title="Demo", ready=REPO)
    monkeypatch.setattr(catalogue, "entries", lambda: {entry.name: entry})
    found = download("Demo", data=tmp_path)
    assert found == tmp_path / "models" / "demo-published"
    manifest = Manifest.load(found)
    assert manifest == Manifest.load(demo)
    for file in manifest.files:
        assert (found / file.path).read_bytes() == (demo / file.path).read_bytes()
    assert catalogue.look_up("demo-published", tmp_path).compressed
    assert answer(found) == answer(demo) != ""


def test_an_original_is_compressed_while_it_arrives_and_answers(loopback, demo_checkpoint, tmp_path):
    original, compressed_here = make(tmp_path / "made", demo_checkpoint)
    loopback.add_folder("me/Original", original)
    found = download("me/Original", data=tmp_path, choice=CompressOptions(16, "cpu", keep_original=False))
    assert Manifest.load(found).layers == 2
    assert answer(found) == answer(compressed_here) != ""
    publish(found, REPO, Hub.here("hf_mine"))               # and on it goes, to the next person
    again = download(REPO, data=tmp_path)
    assert Manifest.load(again) == Manifest.load(found) and answer(again) == answer(found)


def test_a_gguf_file_is_imported_and_answers(loopback, demo_checkpoint, tmp_path):
    """With nothing of the original but its configuration: the tokenizer is in the file."""
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    from tests.support.gguf_files import write
    original, compressed_here = make(tmp_path / "made", demo_checkpoint)
    write(tmp_path / "model-F32.gguf", "qwen3_moe", AutoModelForCausalLM.from_pretrained(original), "F32",
          demo_checkpoint)
    loopback.add("me/Model-GGUF", {name.name: name.read_bytes() for name in (
        tmp_path / "model-F32.gguf", original / "config.json")})
    found = download("me/Model-GGUF", data=tmp_path, choice=CompressOptions(16, "cpu"))
    assert Manifest.load(found).layers == 2
    assert answer(found) == answer(compressed_here) != ""


def test_what_is_uploaded(loopback, folder):
    address = publish(folder, REPO, Hub.here("hf_mine"))
    files = loopback.repositories[REPO].at("main")[1]
    assert address.startswith(loopback.endpoint)
    assert {name: data for name, data in files.items() if name not in ("README.md", ".gitattributes")} == {
        path.name: path.read_bytes() for path in folder.iterdir()}
    n_puts = sum(request.startswith("PUT") for request in loopback.requests)
    publish(folder, REPO, Hub.here("hf_mine"))
    assert sum(request.startswith("PUT") for request in loopback.requests) == n_puts     # nothing sent twice


def test_nothing_that_is_published_tells_where_it_lay(loopback, folder, tmp_path):
    """Neither what is made today nor a folder of an older version, whose configuration named its checkpoint."""
    old = shutil.copytree(folder, tmp_path / "old")
    weights = tuple(entry for entry in Manifest.load(old).files if entry.path.endswith(".safetensors"))
    replace(Manifest.load(old), format_version=1, files=weights).save(old)
    for name, key, place in (("config.json", "_name_or_path", "/srv/someone/model"),
                             ("tokenizer_config.json", "name_or_path", "C:\\Users\\someone\\model")):
        told = json.loads((old / name).read_text()) | {key: place, "sub": {key: place}, "of_hub": {key: "me/model"}}
        (old / name).write_text(json.dumps(told))
    for each in (folder, old):
        publish(each, REPO, Hub.here("hf_mine"))
        files = loopback.repositories[REPO].at("main")[1]
        assert not [name for name, data in files.items() if b"someone" in data or str(folder.parent).encode() in data]
    assert json.loads(files["config.json"])["of_hub"] == {"_name_or_path": "me/model"}


def test_the_ordinary_client_pulls_it_and_transformers_opens_it(loopback, folder, tmp_path):
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM

    import engine.hf  # noqa: F401
    publish(folder, REPO, Hub.here("hf_mine"))
    with LoopbackHub() as cdn:                              # large files lie elsewhere, as with the public Hub
        cdn.lfs, loopback.cdn = loopback.lfs, cdn.endpoint
        found = Path(snapshot_download(REPO, endpoint=loopback.endpoint, local_dir=tmp_path / "pulled", token=False))
    for path in folder.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes()
    opened = AutoModelForCausalLM.from_pretrained(found)
    assert opened.config.quantization_config.group_size == Manifest.load(folder).group_size


def test_the_card_tells_levels_sizes_and_how_to_load(demo, tmp_path):
    manifest = Manifest.load(demo)
    text = card(demo, manifest, REPO)
    assert text.startswith("---\n") and text.count("\n---\n") == 1
    for level, found in manifest.calibration["levels"].items():
        assert f"| {level} |" in text and f"{found['perplexity']:.3f}" in text
    assert f"download {REPO}" in text and "from_pretrained" in text and "6 MoE layers of 16 experts" in text
    shutil.copytree(demo, tmp_path / "again")
    (tmp_path / "again" / "README.md").write_text(text, encoding="utf-8")
    assert card(tmp_path / "again", manifest, REPO) == text           # publishing twice does not double it


def test_an_uncalibrated_folder_says_so(folder):
    text = card(folder, Manifest.load(folder), "me/x")
    assert "Not calibrated" in text and text.startswith("---\nlibrary_name: floechat")


def test_damaged_and_unfinished_folders_are_not_published(loopback, folder, tmp_path):
    with pytest.raises(UserError, match="not a finished compressed folder"):
        publish(tmp_path, REPO, Hub.here())
    shutil.copytree(folder, tmp_path / "bad")
    path = tmp_path / "bad" / "experts-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged .its sha256 differs"):
        publish(tmp_path / "bad", REPO, Hub.here())
    assert not loopback.repositories


@pytest.mark.parametrize("place, code, kind, words", [
    ("api/repos/create", 401, UserError, "token that may write"), ("api/repos/create", 403, UserError, "may write"),
    (f"api/models/{REPO}/commit/main", 500, MachineError, "refused the upload.*500")])
def test_refusals_become_sentences(loopback, folder, place, code, kind, words):
    loopback.fault(place, *[status(code)] * 9)
    with pytest.raises(kind, match=words):
        publish(folder, REPO, Hub.here("hf_mine"))


def test_the_card_names_original_and_licence(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "made")
    entry = catalogue.entries()["mixtral-8x7b"]
    Source("https://hub", entry.repository, "c0ffee", "original", ()).save(tmp_path / "made")
    text = card(tmp_path / "made", Manifest.load(folder), REPO)
    assert f"base_model: {entry.repository}\n" in text and "license: apache-2.0\n" in text
    assert "at commit c0ffee" in text


def test_a_hub_out_of_reach(folder):
    with pytest.raises(MachineError, match="upload to me/Demo-Floe broke off.*start again"):
        publish(folder, REPO, Hub("http://127.0.0.1:9", token="hf_mine"))


def test_an_upload_that_breaks_off_goes_on(loopback, folder):
    """The commit comes last: nothing is published until all files have arrived, and those are not sent again."""
    loopback.fault(f"api/models/{REPO}/commit/main", *[status(500)] * 9)
    with pytest.raises(MachineError):
        publish(folder, REPO, Hub.here("hf_mine"))
    assert "floe.json" not in loopback.repositories[REPO].at("main")[1]
    sent = sum(request.startswith("PUT") for request in loopback.requests)
    loopback.faults.clear()
    publish(folder, REPO, Hub.here("hf_mine"))
    assert sent > 0 and sum(request.startswith("PUT") for request in loopback.requests) == sent
    assert "floe.json" in loopback.repositories[REPO].at("main")[1]


def test_an_unfinished_folder_is_not_published(loopback, folder, tmp_path):
    """As a killed compression leaves it: all files but the manifest, and the notes of how far it is."""
    shutil.copytree(folder, tmp_path / "half")
    (tmp_path / "half" / "floe.json").unlink()
    (tmp_path / "half" / "floe.partial.json").write_text("{}")
    with pytest.raises(UserError, match="half is not a finished compressed folder; compress the model first"):
        publish(tmp_path / "half", REPO, Hub.here("hf_mine"))
    assert not loopback.requests


def test_the_verb(loopback, folder, capsys):
    from engine.__main__ import main
    assert main(["publish", str(folder), REPO, "--token", "hf_mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repository"] == REPO
    assert main(["publish", str(folder), "no id at all"]) == 2
