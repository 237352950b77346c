"""Anybody on the computer can connect: nobody without a link keeps connections, or keeps others out."""
from __future__ import annotations

import asyncio
import socket
import threading
import time

import h11
import httpx
import pytest
import uvicorn

from app.http import connection
from app.http.connection import CONNECTIONS, HEADER_BYTES, Connection

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"


async def application(scope, receive, send):
    """Refuses a POST without reading it, as the guard does; answers the rest slowly, in pieces."""
    await send({"type": "http.response.start", "status": 401 if scope["method"] == "POST" else 200, "headers": []})
    for _ in range(0 if scope["method"] == "POST" else 5):
        await asyncio.sleep(0.2)
        await send({"type": "http.response.body", "body": b"piece ", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def address(monkeypatch):
    """A server that waits 0.3 seconds for a head and for a body."""
    monkeypatch.setattr(connection, "SECONDS", {h11.IDLE: 0.3, h11.SEND_BODY: 0.3})
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application, http=Connection, log_level="error", lifespan="off",
                                           h11_max_incomplete_event_size=HEADER_BYTES))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join()


def ended(client: socket.socket, word: bytes = b"") -> bytes:
    """Says the word again and again until the server hangs up; what it has answered."""
    client.settimeout(0.02)
    answer, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        try:
            client.sendall(word)
            piece = client.recv(65536)
            answer += piece
            if not piece:
                return answer
        except TimeoutError:
            pass
        except OSError:
            return answer
    raise AssertionError("it was waited for")


@pytest.mark.parametrize("begun, word", [(b"", b""), (HEAD, b""), (HEAD, b"A: b\r\n"), (POST, b""), (POST, b"x"),
                                         (HEAD + b"\r\n" + HEAD, b"A: b\r\n")])
def test_who_does_not_finish_a_request_is_left(address, begun, word):
    with socket.create_connection(address) as client:
        client.sendall(begun)
        answer = ended(client, word)
    assert answer.count(b"HTTP/1.1 ") == begun.count(b"\r\n\r\n")


def test_who_waits_for_an_answer_is_not_left(address):
    assert httpx.get("http://{}:{}".format(*address)).text == "piece " * 5


def test_too_many_connections_are_refused_and_end_by_themselves(address):
    crowd = [socket.create_connection(address) for _ in range(CONNECTIONS + 20)]
    for client in crowd:
        ended(client)
        client.close()
    assert httpx.get("http://{}:{}".format(*address)).status_code == 200


def test_the_cookies_of_many_programs_fit_and_a_head_without_end_does_not(address):
    cookies = {"cookie": "; ".join(f"program{i}=" + "v" * 4000 for i in range(50))}
    assert httpx.get("http://{}:{}".format(*address), headers=cookies).status_code == 200
    with socket.create_connection(address) as client:
        client.sendall(HEAD + b"A: ")
        assert b" 200 " not in ended(client, b"b" * HEADER_BYTES)
