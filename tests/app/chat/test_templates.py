"""A model whose chat template cannot be used: conversations are read all the same, and what an answer is asked for says
why in one sentence. The same program then answers with another model."""
from __future__ import annotations

import shutil
import threading

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.http import api
from app.library import open_model as models_module
from app.server import Parts
from engine import Options, demo_model
from tests.support import waiting

until = waiting.until
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "refuses": "{{ raise_exception('Roles must alternate') }}",
    "refuses a second message": "{% if messages[1:] %}{{ raise_exception('Too long.\\nReally.') }}{% endif %}ok",
    "loops": LOOP,
    "does not end": "{% for m in messages %}",
    "is no template": "{{ }} {% what %}",
    "looks for what is not there": "{{ nothing.at.all }}",
    "writes without end": "{% for i in range(10**9) %}long enough{% endfor %}",
    "fills the memory": "{{ 'x' * 10**11 }}",
    "reaches inside": "{{ ''.__class__.__mro__ }}",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    if not (demo_model() / "floe.json").is_file():
        pytest.skip("the embedded model (assets/demo) has not been built")
    data = tmp_path_factory.mktemp("data")
    (data / "cache").mkdir()
    parts = Parts.make(data, demo_model(), Options("exact", device="cpu"))
    parts.jobs.start()
    yield parts
    parts.close()


@pytest.fixture
def client(parts):
    app = FastAPI()
    app.include_router(api.routes(parts.chats, parts.drafts, parts.jobs, parts.models, parts.shelf, lambda: None))
    with TestClient(app) as client:
        yield client


def opened(parts, template: str | None = None, seconds: float = 1.0):
    """The demonstration model, with another template if one is given."""
    folder = demo_model()
    if template is not None:
        folder = parts.around.data / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(demo_model(), folder)
        (folder / "chat_template.jinja").write_text(template)
    parts.models.open(folder, "exact")
    engine = parts.models.wait(threading.Event())
    engine._turns.tokens.template._seconds = seconds
    return engine


def answered(parts, client, conversation: int):
    number = client.post(f"/api/conversations/{conversation}/send", json={"text": "How are you?"}).json()["message"]
    until(lambda: parts.jobs.live is None)
    return parts.chats.message(number)


def begun(parts) -> int:
    conversation = parts.chats.create(settings={"temperature": 0, "max_tokens": 4})
    question = parts.chats.add(conversation.id, None, "user", "Hello!")
    parts.chats.add(conversation.id, question.id, "assistant", "Hello, you.")
    return conversation.id


@pytest.mark.parametrize("name", TEMPLATES)
def test_reading_asks_no_model_and_an_answer_says_why(parts, client, monkeypatch, name):
    monkeypatch.setattr(models_module, "METER_SECONDS", 1.0)
    opened(parts, TEMPLATES[name])
    conversation = begun(parts)
    read = client.get(f"/api/conversations/{conversation}")
    assert read.status_code == 200 and len(read.json()["messages"]) == 2
    meter = client.get(f"/api/conversations/{conversation}/context").json()
    assert meter == {"used": None, "total": 1024}
    for _ in range(2):  # the second time must not be another sentence
        answer = answered(parts, client, conversation)
        said = answer.stats["error"]
        assert answer.status == "error" and "chat template" in said and "\n" not in said and said[-1] == "."
    assert client.get(f"/api/conversations/{conversation}").status_code == 200
    opened(parts)
    assert answered(parts, client, conversation).status in ("done", "length")
    assert client.get(f"/api/conversations/{conversation}/context").json()["used"] > 10


def test_a_system_prompt_that_goes_with_the_first_question_is_said_once(parts, client):
    opened(parts, "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
                  "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    for system, said in (("Be brief.", [1, None]), ("", [None, None])):
        conversation = parts.chats.create(settings={"system": system, "temperature": 0, "max_tokens": 4})
        assert [answered(parts, client, conversation.id).stats.get("folded") for _ in range(2)] == said


def test_stop_ends_an_answer_whose_template_loops(parts, client):
    engine = opened(parts, LOOP, seconds=1000)
    conversation = begun(parts)
    number = client.post(f"/api/conversations/{conversation}/send", json={"text": "How are you?"}).json()["message"]
    until(lambda: engine._turns.tokens.template._lock.locked())
    client.post("/api/stop")
    until(lambda: parts.chats.message(number).status == "stopped", 30)  # the template would have gone on
    opened(parts)
    assert answered(parts, client, conversation).status in ("done", "length")


def test_opening_another_model_does_not_wait_for_a_template_that_loops(parts, client):
    engine = opened(parts, LOOP, seconds=1000)
    answer = engine.side_chat([{"role": "user", "content": "A title"}])  # on the model's own thread
    until(lambda: engine._turns.tokens.template._lock.locked())
    opened(parts)
    assert list(answer)[-1].reason == "stopped"
    assert answered(parts, client, begun(parts)).status in ("done", "length")
