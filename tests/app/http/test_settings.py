"""Settings over the routes: whose they are stands in every request and every answer."""
from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.http import api
from app.server import Parts
from engine import Options, demo_model

POET = {"system": "You are a poet.", "temperature": 0.4}


@pytest.fixture
def parts(tmp_path):
    parts = Parts.make(tmp_path, demo_model(), Options(device="cpu"))
    parts.jobs.start()
    yield parts
    parts.close()


@pytest.fixture
def ask(parts):
    app = FastAPI()
    api.speak_in_sentences(app)
    app.include_router(api.routes(parts.chats, parts.drafts, parts.jobs, parts.models, parts.shelf, lambda: None))
    with TestClient(app) as client:
        def ask(method: str, whose: object, body: dict | None = None, path: str = ""):
            return client.request(method, f"/api/settings{path}", params={"whose": str(whose)}, json=body)
        yield ask


def test_every_answer_says_whose_settings_it_holds(parts, ask):
    one, other = parts.chats.create().id, parts.chats.create().id
    assert ask("PATCH", one, {"changes": POET}).json() | {"presets": []} == {
        "whose": str(one), "settings": POET, "preset": "custom", "presets": [], "remotes": []}
    answer = ask("GET", other).json()
    assert (answer["whose"], answer["settings"], answer["preset"]) == (str(other), {}, "model")
    assert ask("PATCH", one, {"changes": {"temperature": None}}).json()["settings"] == {"system": POET["system"]}
    assert parts.chats.conversation(other).settings == {}


def test_a_draft_that_has_begun_meanwhile_means_its_conversation(parts, ask):
    ask("PATCH", "a-tab", {"changes": POET})
    begun = parts.drafts.begin("a-tab")
    ask("PATCH", "a-tab", {"changes": {"seed": 5}})  # sent before the tab heard of it
    assert parts.chats.conversation(begun.id).settings == POET | {"seed": 5}


@pytest.mark.parametrize("changes", [{"temperature": 77}, {"top_k": "many"}, {"policy": "none"}, {"system": 5}])
def test_what_cannot_be_is_refused_and_nothing_of_it_stored(parts, ask, changes):
    whose = parts.chats.create().id
    ask("PATCH", whose, {"changes": POET})
    reply = ask("PATCH", whose, {"changes": changes | {"seed": 1}})
    assert reply.status_code == 400 and reply.json()["error"].endswith(".")
    assert ask("GET", whose).json()["settings"] == POET


def test_presets_are_chosen_kept_and_deleted(parts, ask):
    one, other = parts.chats.create().id, parts.chats.create().id
    ask("PATCH", one, {"changes": POET})
    assert ask("POST", one, {"name": "Poet / late"}, "/preset").json()["preset"] == "Poet / late"
    chosen = ask("PATCH", other, {"preset": "Poet / late", "changes": {}}).json()
    assert chosen["settings"] == POET and ["Poet / late", "Poet / late"] in chosen["presets"]
    assert ask("PATCH", other, {"preset": "precise"}).json()["settings"] == {
        "system": "You are a poet.", "temperature": 0.2, "top_p": 0.9}
    assert ask("DELETE", other, {"name": "precise"}, "/preset").status_code == 400
    assert ask("DELETE", one, {"name": "Poet / late"}, "/preset").json()["preset"] == "custom"
