"""Addresses of the Hub as people paste them, a search over the real client, a repository looked at before it is
fetched."""
from __future__ import annotations

import argparse
import json

import pytest

from engine.cli.models import plan
from engine.core import MachineError, UserError
from engine.library import catalogue
from engine.library.download import wanted
from engine.library.hub import address
from engine.library.hub_search import examine_repository, search_hub
from tests.support.loopback_hub import LoopbackHub, status

MIXTRAL = json.dumps(dict(catalogue.entries()["mixtral-8x7b"].config)).encode()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add("maker/Boat", {"config.json": MIXTRAL, "model.safetensors": b"x" * 1000})
        hub.add("other/Boat-GGUF", {"Boat-Q4_K_M.gguf": b"x" * 300, "Boat-Q8_0-00001-of-00002.gguf": b"x" * 400,
                                    "Boat-Q8_0-00002-of-00002.gguf": b"x" * 200, "mmproj-Boat.gguf": b"x"})
        hub.cards["other/Boat-GGUF"] = {"base_model": ["maker/Boat"]}
        hub.add("other/Boat-pictures", {"picture.png": b"x"})
        yield hub


@pytest.mark.parametrize("typed, meant", [
    ("owner/name", ("owner/name", "")),
    ("https://huggingface.co/Qwen/Qwen3-30B-A3B", ("Qwen/Qwen3-30B-A3B", "")),
    ("https://huggingface.co/a/b/tree/main?library=transformers#top", ("a/b", "")),
    ("https://huggingface.co/a/b/blob/main/Q4/x%20y.gguf?download=true", ("a/b", "Q4/x y.gguf")),
    ("huggingface.co/a/b/resolve/main/x-00001-of-00002.gguf", ("a/b", "x-00001-of-00002.gguf")),
    ("hf.co/unsloth/X-GGUF:Q4_K_M", ("unsloth/X-GGUF", "Q4_K_M")),
    ("ollama run hf.co/a/b:Q8_0", ("a/b", "Q8_0")),
    ("hf download a/b", ("a/b", "")),
    ("qwen3 coder", None), ("gpt-oss-20b", None), ("./a/b", None), ("~/x", None), ("/a/b", None), ("C:\\x\\y", None),
    ("https://example.com/a/b", None), ("a/b/c", None), ("", None), ("owner/name ", None)])
def test_an_address_means_its_repository_and_file(typed, meant):
    assert address(typed) == meant


@pytest.mark.parametrize("typed", ["https://huggingface.co/datasets/a/b", "https://huggingface.co/Qwen",
                                   "hf.co/spaces/a/b"])
def test_an_address_of_the_hub_that_is_no_models_is_said(typed):
    with pytest.raises(UserError, match="not the address of a model"):
        address(typed)


def test_a_pasted_file_is_the_one_that_is_fetched():
    model = wanted("https://huggingface.co/a/Boat-GGUF/blob/main/Q4/Boat-Q4_K_M.gguf")
    assert (model.name, model.repository, model.gguf_file) == ("Boat-GGUF", "a/Boat-GGUF", "Q4/Boat-Q4_K_M.gguf")


def test_pasted_addresses_are_planned(hub, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    for typed in ("https://huggingface.co/maker/Boat", "hf.co/maker/Boat/tree/main", "hf.co/other/Boat-GGUF:Q4_K_M",
                  "https://huggingface.co/other/Boat-GGUF/blob/main/Boat-Q4_K_M.gguf"):
        words = argparse.Namespace(data=tmp_path, device="cpu")
        made = plan.run(parser.parse_args([typed, "--machine", "rtx-3060-12gb"], words))
        assert made["verdict"] == "fits" and made["context"] == 8192
        assert capsys.readouterr().err.startswith("other/Boat-GGUF on" if "GGUF" in typed else "maker/Boat on")
    assert set(hub.served) == {"config.json"}


def test_cards_that_name_each_other_have_an_end(hub, tmp_path):
    for one, other in (("a/x", "a/y"), ("a/y", "a/x")):
        hub.add(one, {"x.gguf": b"x"})
        hub.cards[one] = {"base_model": other}
    with pytest.raises(UserError, match="a/y has no config.json"):
        catalogue.look_up("a/x", tmp_path)


def test_a_search_names_what_could_be_fetched(hub):
    hits = {hit.repository: hit.formats for hit in search_hub(" boat ")}
    assert hits == {"maker/Boat": ("safetensors",), "other/Boat-GGUF": ("gguf",)}
    assert search_hub("nothing of that name") == ()


def says(answer):
    def fault(handler) -> bool:
        handler.document(answer)
        return True
    return fault


def test_a_search_that_fails_is_one_sentence(hub):
    hub.fault("api/models", status(403))
    with pytest.raises((UserError, MachineError), match=r"^[^\n]+\.$"):
        search_hub("boat")
    for answer in (None, 5, {"error": "x"}):
        hub.fault("api/models", says(answer))
        with pytest.raises(MachineError, match="not a Hub's"):
            search_hub("boat")
    hub.fault("api/models", says([{"id": 7}, 5, {"id": "../x"}, {"id": "a/b", "tags": "gguf", "likes": "x"}]))
    assert search_hub("boat") == ()


def test_a_repository_is_looked_at_without_its_weights(hub, tmp_path):
    found = examine_repository(" maker/Boat ", tmp_path)
    assert (found.download_bytes, found.files, found.why) == (1000, (), "") and found.known.spec.experts == 8
    assert sum("/tree/" in request for request in hub.requests) == 1
    found = examine_repository("hf.co/other/Boat-GGUF:Q8_0", tmp_path)
    assert found.files == (("Boat-Q4_K_M", 300), ("Boat-Q8_0", 600)) and found.file == "Q8_0"
    assert found.known.name == "other/Boat-GGUF" and found.known.spec.experts == 8  # of what it was made of
    assert "config.json" in examine_repository("other/Boat-pictures", tmp_path).why
    del hub.cards["other/Boat-GGUF"]
    assert "names no original" in examine_repository("other/Boat-GGUF", tmp_path).why
    assert not any(name.endswith((".gguf", ".safetensors")) for name in hub.served)
    with pytest.raises(UserError, match="does not exist"):
        examine_repository("maker/none", tmp_path)


@pytest.mark.parametrize("index, n_bytes", [({}, 1000), ({"model.safetensors.index.json": b"{}"}, 1070)])
def test_weights_are_counted_as_they_would_be_fetched(hub, tmp_path, index, n_bytes):
    hub.add("maker/Twice", {"config.json": MIXTRAL, "model.safetensors": b"x" * 1000, "other.safetensors": b"x" * 70,
                            "consolidated.safetensors": b"x" * 9000, "old/model.safetensors": b"x" * 300} | index)
    assert examine_repository("maker/Twice", tmp_path).download_bytes == n_bytes
