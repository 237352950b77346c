"""A Hub on the loopback interface that the unmodified client library can talk to, and that can misbehave on demand.

Repositories live in memory: branches, commits, files. Large files go by LFS: resolve answers with a redirect to
/cdn/SHA256, as the public Hub does. `faults` maps a path of a file to functions that are called in turn with the
handler, one per request for its bytes; a function that returns True has answered. `served` counts bytes per path;
`cards` holds what the front matter of a repository's card says.
"""
from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support import waiting

LFS_FROM = 64 << 10
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")


@dataclass
class Repository:
    """branches: name -> commit; commits: id -> {path: bytes}."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        number = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[number] = dict(files)
        self.branches[branch] = number
        return number

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        number = self.branches.get(revision, revision)
        return (number, self.commits[number]) if number in self.commits else None


def is_lfs(path: str, data: bytes) -> bool:
    return path.endswith(LFS_SUFFIXES) or len(data) >= LFS_FROM


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class LoopbackHub:
    """Use as a context manager. `endpoint` is what HF_ENDPOINT wants; bytes of a read answer come in `piece` steps."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.served: Counter[str] = Counter()
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.cards: dict[str, dict] = {}
        self.tokens_seen: list[tuple[str, str | None]] = []
        self.cdn: str | None = None
        self.ranges = True
        self.connected: set[int] = set()        # threads of connections that are open
        self.pause = 0.0
        self.piece = 16 << 10
        hub = self

        class Handler(_Handler):
            loopback = hub

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """A commit on main that holds exactly these files; -> its id."""
        repository = self.repositories.setdefault(name, Repository())
        for path, data in files.items():
            if is_lfs(path, data):
                self.lfs[sha256(data)] = data
        return repository.commit(files)

    def add_folder(self, name: str, folder: Path) -> str:
        return self.add(name, {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()})

    def settle(self) -> None:
        """Wait until clients that were killed have been noticed: what they asked for last may still be on its way, or
        not even begun. For a test whose own process has not talked to this hub: its connection stays open."""
        waiting.until(lambda: not self.connected)

    def fault(self, path: str, *functions) -> None:
        self.faults.setdefault(path, []).extend(functions)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Clients that are killed in the middle of a request are what this is for."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    loopback: LoopbackHub

    def log_message(self, *args) -> None:
        pass

    def setup(self) -> None:
        self.loopback.connected.add(threading.get_ident())
        super().setup()

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.loopback.connected.discard(threading.get_ident())

    # --- reading ----------------------------------------------------------------------------------------------
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.loopback, unquote(urlsplit(self.path).path).lstrip("/")
        hub.requests.append(f"{self.command} {path}")
        hub.tokens_seen.append((path, self.headers.get("Authorization")))
        if self._faulty(path):
            return
        if path.startswith("cdn/"):
            sha, _, name = path.removeprefix("cdn/").partition("/")
            self._bytes(name, hub.lfs.get(sha))
        elif path == "api/models":
            self._search(parse_qs(urlsplit(self.path).query))
        elif path.startswith("api/models/"):
            self._api(path.removeprefix("api/models/").split("/"))
        elif "/resolve/" in path:
            name, _, rest = path.partition("/resolve/")
            self._resolve(name, *rest.split("/", 1))
        else:
            self.answer(404)

    def _faulty(self, path: str) -> bool:
        """Faults are known by what follows resolve/REVISION/ or cdn/HASH/, or by the address itself."""
        faults, of_bytes = self.loopback.faults, path.startswith("cdn/") or "/resolve/" in path
        waiting = faults.get(path) or (faults.get(path.rpartition("/")[2]) if of_bytes else None)
        return bool(waiting) and bool(waiting.pop(0)(self))

    def _repository(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.loopback.repositories.get(name)
        if repository is None:
            self.answer(404, code="RepoNotFound")
        elif name in self.loopback.gated and not self.headers.get("Authorization"):
            self.answer(403, code="GatedRepo")
        elif repository.at(revision) is None:
            self.answer(404, code="RevisionNotFound")
        else:
            return repository.at(revision)

    def _search(self, asked: dict[str, list[str]]) -> None:
        """As the Hub does it: names that have the words, with the formats among the tags."""
        words, most = asked["search"][0].lower(), int(asked["limit"][0])
        found = [name for name in self.loopback.repositories if words in name.lower()][:most]
        files = {name: self.loopback.repositories[name].at("main")[1] for name in found}
        self.document([{"_id": "1", "id": name, "modelId": name, "likes": 7, "downloads": 1234, "private": False,
                        "tags": ["en", *(ending for ending in ("safetensors", "gguf")
                                         if any(path.endswith(ending) for path in files[name]))]} for name in found])

    def _api(self, parts: list[str]) -> None:
        name, kind, revision = "/".join(parts[:2]), (parts + ["info"])[2], (parts + ["info", "main"])[3]
        found = self._repository(name, revision)
        if found is None:
            return
        commit, files = found
        if kind == "tree":
            self.document([_entry(path, data) for path, data in files.items()])
        else:
            self.document({"_id": "1", "id": name, "modelId": name, "sha": commit, "private": False, "tags": [],
                           "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in files],
                           "cardData": self.loopback.cards.get(name, {})})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._repository(name, revision)
        if found is None:
            return
        commit, files = found
        data = files.get(path)
        if data is None:
            self.answer(404, code="EntryNotFound")
        elif is_lfs(path, data):
            sha = sha256(data)
            self.answer(302, headers={"X-Repo-Commit": commit, "X-Linked-Etag": f'"{sha}"',
                                      "X-Linked-Size": str(len(data)), "ETag": f'"{sha}"',
                                      "Location": f"{self.loopback.cdn or self.loopback.endpoint}/cdn/{sha}/{path}"})
        else:
            self._bytes(path, data, {"X-Repo-Commit": commit, "ETag": f'"{git_hash(data)}"'})

    def _bytes(self, name: str, data: bytes | None, headers: dict | None = None) -> None:
        if data is None:
            self.answer(404, code="EntryNotFound")
            return
        start, end, wanted = 0, len(data), self.headers.get("Range")
        if wanted and self.loopback.ranges:
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            start, end = int(low), min(int(high) + 1, len(data)) if high else len(data)
            headers = {**(headers or {}), "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        self.start(206 if wanted and self.loopback.ranges else 200, end - start, headers)
        if self.command == "GET":
            self.send(name, data[start:end])

    def send(self, name: str, data: bytes) -> None:
        """The body, slowly if `pause` says so, counted as it leaves."""
        hub = self.loopback
        for at in range(0, len(data), hub.piece):
            piece = data[at:at + hub.piece]
            try:
                self.wfile.write(piece)
            except OSError:
                self.close_connection = True
                return
            hub.served[name] += len(piece)
            if hub.pause:
                threading.Event().wait(hub.pause)

    # --- writing ----------------------------------------------------------------------------------------------
    def do_POST(self) -> None:
        hub, path = self.loopback, unquote(urlsplit(self.path).path).lstrip("/")
        body = self._body()
        hub.requests.append(f"POST {path}")
        if self._faulty(path):
            return
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            hub.repositories.setdefault(name, Repository()).commit({".gitattributes": b""})
            self.document({"url": f"{hub.endpoint}/{name}", "name": name, "id": name})
        elif path == "api/validate-yaml":
            self.document({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            self.document({"files": [{"path": file["path"], "shouldIgnore": False, "uploadMode":
                                      "lfs" if is_lfs(file["path"], b" " * file["size"]) else "regular"}
                                     for file in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            wanted = [self._wanted(each) for each in json.loads(body)["objects"]]
            self.document({"transfer": "basic", "objects": wanted})
        elif "/commit/" in path:
            self._commit(path.removeprefix("api/models/").partition("/commit/")[0], body)
        else:
            self.answer(404)

    def do_PUT(self) -> None:
        body = self._body()
        self.loopback.requests.append(f"PUT {self.path}")
        if sha256(body) != self.path.rpartition("/")[2]:
            self.answer(400)
            return
        self.loopback.lfs[sha256(body)] = body
        self.answer(200)

    def _wanted(self, asked: dict) -> dict:
        place = {"upload": {"href": f"{self.loopback.endpoint}/upload/{asked['oid']}", "header": {}}}
        return {**asked, **({} if asked["oid"] in self.loopback.lfs else {"actions": place})}

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.loopback.repositories[name]
        files = dict(repository.at("main")[1])
        for line in filter(None, body.split(b"\n")):
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.loopback.lfs[item["value"]["oid"]]
        number = repository.commit(files)
        self.document({"success": True, "commitOid": number, "commitUrl": f"{self.loopback.endpoint}/{name}/commit/"
                       + number, "hookOutput": ""})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # --- answers ----------------------------------------------------------------------------------------------
    def start(self, status: int, length: int, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()

    def answer(self, status: int, code: str | None = None, headers: dict | None = None) -> None:
        extra = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self.start(status, 0, {**extra, **(headers or {})})

    def document(self, value) -> None:
        body = json.dumps(value).encode()
        self.start(200, len(body), {"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(body)


def git_hash(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
    if is_lfs(path, data):
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
    return entry


# --- faults: each is a function of the handler; True when it has answered -----------------------------------------
def status(code: int, name: str | None = None, **headers: str):
    def fault(handler: _Handler) -> bool:
        handler.answer(code, name, headers)
        return True
    return fault


def _range(handler: _Handler, data: bytes) -> tuple[int, int]:
    low, _, high = (handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
    return int(low), min(int(high) + 1, len(data)) if high else len(data)


def passes(handler: _Handler) -> bool:
    """No fault: lets one request (the redirect before the bytes, say) go by."""
    return False


def cut(data: bytes, after: int, stall: threading.Event | None = None):
    """Promise the range, send `after` bytes of it, then hang up (or first wait for `stall`)."""
    def fault(handler: _Handler) -> bool:
        start, end = _range(handler, data)
        handler.start(206, end - start, {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})
        handler.send(handler.path.rpartition("/")[2], data[start:min(end, start + after)])
        handler.wfile.flush()
        if stall:
            stall.wait(20)
        handler.close_connection = True
        handler.connection.shutdown(2)
        return True
    return fault


def instead(data: bytes):
    """Serve other bytes, range and all, as if they were the file."""
    def fault(handler: _Handler) -> bool:
        start, end = _range(handler, data)
        handler.start(206, end - start, {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})
        handler.wfile.write(data[start:end])
        return True
    return fault
