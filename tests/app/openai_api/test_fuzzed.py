"""schemathesis makes requests from the interface's own description: none of them is an error of the program's."""
from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, given, seed, settings

from app.openai_api import routes
from app.openai_api.keys import Keys
from app.openai_api.served import Served
from app.server import Parts
from engine import Options, demo_model
from tests.support.waiting import until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fastapi.testclient import TestClient
schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    parts = Parts.make(tmp_path_factory.mktemp("data"), demo_model(), Options(device="cpu", level="balanced"))
    parts.models.open()
    until(lambda: parts.models.state == "ready")
    keys = Keys(list, lambda keys: None)
    secret = keys.make("fuzzer")
    door = routes.build(Served(parts.models, parts.shelf), parts.jobs.line, keys)
    yield TestClient(door, headers={"authorization": f"Bearer {secret}"})
    parts.models.close()
    parts.around.close()
    parts.chats.close()


def test_no_request_is_answered_with_an_error_of_ours(program):
    document = program.get("/v1/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    asked = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @seed(17)
        @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def ask(case):
            body = case.body if isinstance(case.body, dict) else None
            if body is not None:  # past the first refusals, to the engine
                body = body | {"model": "demo", "max_tokens": 1, "max_completion_tokens": 1}
            reply = program.request(case.method, case.formatted_path, json=body, params=case.query)
            assert reply.status_code < 500, (case.method, case.path, body, reply.text)
            asked.append(reply.status_code)
        ask()
    assert {200, 404, 422} <= set(asked) and len(asked) > 60
