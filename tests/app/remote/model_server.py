"""A small OpenAI-compatible server, and one that misbehaves in every way that a test names."""
from __future__ import annotations

import json
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def chunk(reason: str | None = None, **delta) -> bytes:
    document = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"
ANSWER = (b": a comment\n\n", chunk(role="assistant", content=""), chunk(reasoning_content="Let me "),
          chunk(reasoning="see."), chunk(content="Hello, "), chunk(content="wörld!"), chunk("stop"), USAGE, DONE)


class ModelServer(ThreadingHTTPServer):
    """answers: for each question the pieces of its answer in turn; an Event among them holds it until it is set, "cut"
    ends the connection, a number is the status. Without: ANSWER. headers: of every answer, in place of the usual ones.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.answers: list[tuple] = []
        self.headers: dict[str, str] = {}
        self.models: bytes = json.dumps({"data": [{"id": "big-moe"}, {"id": "small"}]}).encode()
        self.hold: threading.Event | None = None  # keeps the list of models from coming to its end
        self.gone = threading.Event()  # a connection that the other side ended before its answer

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelServer

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("authorization"))
        status = 200 if self.path == "/v1/models" else 404
        self._begin(status, {"content-type": "application/json", "content-length": str(len(self.server.models))})
        self.wfile.write(self.server.models[:-1])
        while self.server.hold and not self.server.hold.wait(0.02):
            if select.select([self.connection], [], [], 0)[0]:  # nothing more is asked: the other side has ended it
                self.server.gone.set()
                return
        self._write(self.server.models[-1:])

    def do_POST(self) -> None:
        self.server.keys.append(self.headers.get("authorization"))
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append(json.loads(body))
        pieces = self.server.answers.pop(0) if self.server.answers else ANSWER
        status = pieces[0] if isinstance(pieces[0], int) else 200
        self._begin(status, {"content-type": "text/event-stream", "connection": "close"} | self.server.headers)
        self.close_connection = True
        for piece in pieces:
            if piece == "cut":
                return
            if isinstance(piece, threading.Event):
                piece.wait()
            elif isinstance(piece, bytes):
                self._write(piece)

    def _write(self, piece: bytes) -> None:
        try:
            self.wfile.write(piece)
            self.wfile.flush()
        except OSError:
            self.server.gone.set()

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@contextmanager
def model_server() -> Iterator[ModelServer]:
    server = ModelServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
