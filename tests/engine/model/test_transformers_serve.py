"""`python -m engine.hf serve`: transformers' own server and its client on a compressed folder."""
from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
from huggingface_hub import InferenceClient

import engine.hf
from engine.model.registration import FloeExperts
from tests.support.waiting import until


@pytest.fixture
def served(demo_checkpoint: Path):
    """transformers' server in a thread of this process -> (its address, the model's name)."""
    from transformers.cli.serve import Serve
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(force_model=str(demo_checkpoint), device="auto", dtype="auto", host="127.0.0.1", port=port,
                   non_blocking=True)
    try:
        until(lambda: server.server.started)
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill_server()


def test_transformers_serve_answers_from_a_compressed_folder(served, demo_checkpoint):
    server, address = served
    assert httpx.get(f"{address}/health", trust_env=False).status_code == 200
    client = InferenceClient(base_url=f"{address}/v1", api_key="none")
    pieces = client.chat_completion([{"role": "user", "content": "Tell me a story."}], model=str(demo_checkpoint),
                                    max_tokens=12, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert len(text.split()) > 3, text
    model = next(iter(server._model_manager.loaded_models.values())).model
    assert any(isinstance(module, FloeExperts) for module in model.modules()) and model.floe.level == "exact"


def test_the_entry_is_transformers_own_commands_without_its_question_to_the_package_index(monkeypatch, capsys):
    from transformers.cli import transformers as cli
    asked = []
    monkeypatch.setattr(cli, "check_cli_update", lambda *_: asked.append(1))
    monkeypatch.setattr("sys.argv", ["floechat-transformers", "serve", "--help"])
    with pytest.raises(SystemExit) as ended:
        engine.hf.main()
    assert ended.value.code == 0 and not asked
    assert "Run a FastAPI server" in capsys.readouterr().out
