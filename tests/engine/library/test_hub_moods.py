"""A Hub in every mood: a download ends in one sentence or whole and right, soon, in little memory, inside its folder,
without our token at another host; and afterwards the same program downloads from a good Hub."""
from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import Engine, Options, Sampling, demo_model
from engine.core import MachineError, UserError
from engine.library.download import download
from engine.library.hub import Hub
from engine.library.installed import delete, models
from tests.support.loopback_hub import LoopbackHub, cut, instead, sha256, status

REPO, NAME = "me/model", "experts-00000.safetensors"
DATA = bytes(range(256)) * 1200
TRUNK = bytes(5000)
MANIFEST = json.dumps({
    "format_version": 1, "group_size": 64, "trunk_bits": 16, "layers": 1, "experts": 2, "top_k": 1, "neurons": 64,
    "hidden": 64, "files": [{"path": name, "bytes": len(data), "sha256": sha256(data)}
                            for name, data in ((NAME, DATA), ("trunk.safetensors", TRUNK))]}).encode()
FILES = {"floe.json": MANIFEST, "config.json": b'{"model_type": "x"}', NAME: DATA, "trunk.safetensors": TRUNK,
         "tokenizer.json": b"{}" + bytes(2000), "chat_template.jinja": b"{{ messages }}"}
SECONDS, BYTES = 30, 150 << 20
MOODS: dict[str, Callable[[Bad], None]] = {}


class Bad:
    """The Hub that misbehaves, what it has, and another origin that it may point to."""

    def __init__(self, hub: LoopbackHub, foreign: LoopbackHub) -> None:
        self.hub, self.foreign, self.commit = hub, foreign, hub.add(REPO, FILES)
        foreign.add(REPO, FILES)
        self.info, self.tree = f"api/models/{REPO}/revision/main", f"api/models/{REPO}/tree/{self.commit}"
        self.small, self.large = (f"{REPO}/resolve/{self.commit}/{name}" for name in ("config.json", NAME))
        self.cdn = f"cdn/{sha256(DATA)}/{NAME}"

    def always(self, place: str, *faults: Callable) -> None:
        self.hub.fault(place, *faults * 99)


def mood(set_up: Callable[[Bad], None]) -> Callable[[Bad], None]:
    MOODS[set_up.__name__] = set_up
    return set_up


def reply(body: bytes = b"", code: int = 200, **headers: str) -> Callable:
    """An answer as it is, with a true length where none is given."""
    def fault(handler) -> bool:
        handler.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}
                           }.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(body)
        return True
    return fault


def raw(data: bytes, endless: bytes = b"", pause: float = 0.0) -> Callable:
    """These bytes instead of any HTTP, then more of the others while anyone listens."""
    def fault(handler) -> bool:
        handler.close_connection = True
        try:
            handler.wfile.write(data)
            while endless:
                handler.wfile.write(endless)
                time.sleep(pause)
        except OSError:
            pass
        return True
    return fault


def many(named: str, *replies: bytes | Callable, place: str = "info") -> None:
    """One mood for each of these answers."""
    for n, answer in enumerate(replies):
        fault = answer if callable(answer) else reply(answer)
        MOODS[f"{named} {n + 1}"] = lambda bad, fault=fault: bad.always(getattr(bad, place), fault)


def to(location: str, code: int = 302, **headers: str) -> Callable:
    return reply(b"", code, Location=location, **headers)


def entries(*paths: object, size: object = 1, **more: object) -> bytes:
    return json.dumps([{"type": "file", "path": path, "size": size, "oid": "0", **more} for path in paths]).encode()


OPEN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
BOMB = gzip.compress(bytes(100 << 20))
many("no document", b"", b"hello", b"<html>", b"\xff\xfe", b"null", b"[]", b"7", b"{}", b"[" * 100_000,
     b'{"a":' * 50_000, b'{"sha": 7}', b'{"sha": "../../x"}', b'{"sha": "a\\nb"}', b'{"sha": null}', b"[]," * (4 << 20))
many("no listing", b"{}", b"[7]", b"[null]", b'[{"type": "file"}]', b"[" + b"[]," * 1_300_000 + b"[]]", place="tree")
many("a hostile name", *[entries(path) for path in (
    "../x.json", "/etc/x.json", "a\nb.json", "a\\b.json", "a\x1b[31m.json", "\u202enosj.x", "a/../../../x.json", "",
    "n" * 5000 + ".json", "C:\\x.json", "con?.json", None, 7, ["x"])], entries("Floe.json", "floe.json"),
    entries("floe.json", "Config.json", "config.json"), entries("floe.json", "Floe.Source.json"), place="tree")
many("a hostile size", *[entries("floe.json", size=size) for size in (-1, 2**70, 1.5, True, None, "9")],
     entries("floe.json", lfs={"oid": 7, "size": 1}), entries("floe.json", lfs=[1]), place="tree")
many("too many files", entries(*(f"{n}.json" for n in range(21_000))), place="tree")
many("an endless document", raw(OPEN, b"[[[[" * 20_000), raw(OPEN, b" ", 0.01),
     raw(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 99),
     raw(OPEN.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"), b"4\r\n    \r\n"))
many("a packed document", reply(BOMB, Content_Encoding="gzip"), reply(b"x", Content_Encoding="br"))
many("no HTTP", raw(b""), raw(b"SSH-2.0-x\r\n"), raw(b"\0" * 5000), raw(b"HTTP/1.1 abc\r\n\r\n"),
     raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nContent-Length: 20\r\n\r\n"), raw(OPEN + b'{"sha": "'),
     raw(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 300_000 + b"\r\n\r\n"), raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 50))
many("a refusal", *[status(code) for code in (204, 206, 304, 400, 401, 403, 404, 408, 410, 418, 451, 500, 503, 599)],
     status(429, None, **{"Retry-After": "\u00b2"}), status(429, None, **{"Retry-After": "0" * 4000}),
     status(503, None, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), reply(b"[]", 500),
     reply(b"[" * 90_000, 404), raw(b"HTTP/1.1 500 Oh\r\n\r\n", b"oh " * 9000), status(404, "RepoNotFound", X_Y="z"),
     reply(b"", 401, X_Error_Code="GatedRepo", X_Error_Message="\x1b[31mhello"))
many("a refused file", *[status(code) for code in (204, 304, 401, 403, 404, 416, 429, 500, 503)],
     raw(b"HTTP/1.1 503 Oh\r\n\r\n", b"oh " * 9000), place="cdn")
many("a broken file", cut(DATA, 0), cut(DATA, 1), cut(DATA, len(DATA) - 1), raw(b""), raw(b"\0\1"),
     reply(DATA[:1000]), reply(DATA + b"more"), reply(b""), reply(BOMB, Content_Encoding="gzip"),
     reply(DATA, 206, Content_Range="bytes x-y/z"), reply(DATA, 206, Content_Range="bytes 0-1/" + "9" * 5000),
     reply(DATA, 206, Content_Range="bytes 5-9/*"), instead(DATA[::-1]), instead(DATA[:-1]), instead(DATA + b"more"),
     raw(OPEN, b"x" * 30_000), raw(OPEN + DATA[:5000]), raw(OPEN + DATA), place="cdn")
many("another small file", reply(b'{"model_type": "y"}'), reply(b"{}"), reply(b"x" * 19), place="small")
many("a redirect", *[to(place) for place in (
    "file:///etc/passwd", "ftp://127.0.0.1/x", "http://127.0.0.2:1/x", "http://evil.example/x", "http://[", "http://a:b:c/",
    "http://127.0.0.1:99999/", "//evil.example/x", "http://me@127.0.0.1/x", "http:\\\\evil.example\\x", "\u00e9\u00e8",
    "x" * 50_000, "https://huggingface.co.evil.example/x", "/" + "../" * 20 + "etc/passwd", "?", "")],
    to("https://127.0.0.1:1/x"), place="large")
many("a listing elsewhere", *[reply(b"[]", Link=f'<{place}>; rel="next"') for place in (
    "http://evil.example/x", "file:///etc/passwd", "http://[", "\u00e9", "//127.0.0.2/x", "?again")], place="tree")


@mood
def redirects_in_circles(bad: Bad) -> None:
    bad.always(bad.large, to(f"/{bad.large}"))


@mood
def the_api_redirects_in_circles(bad: Bad) -> None:
    bad.always(bad.info, to(f"/{bad.info}", 307))


@mood
def the_api_is_elsewhere(bad: Bad) -> None:
    bad.always(bad.info, to(f"{bad.foreign.endpoint}/{bad.info}", 307))


@mood
def the_next_page_is_elsewhere(bad: Bad) -> None:
    bad.always(bad.tree, reply(b"[]", Link=f'<{bad.foreign.endpoint}/{bad.tree}>; rel="next"'))


@mood
def pages_without_end(bad: Bad) -> None:
    bad.always(bad.tree, reply(entries("a.json"), Link=f'</{bad.tree}>; rel="next"'))


@mood
def large_files_come_from_elsewhere(bad: Bad) -> None:
    bad.hub.cdn = bad.foreign.endpoint


@mood
def elsewhere_sends_back(bad: Bad) -> None:
    bad.hub.cdn = bad.foreign.endpoint
    bad.foreign.fault(bad.cdn, *[to(f"{bad.hub.endpoint}/{bad.large}")] * 99)


@mood
def a_redirect_with_an_endless_body(bad: Bad) -> None:
    bad.always(bad.large, raw(f"HTTP/1.1 302 x\r\nLocation: /{bad.cdn}\r\n\r\n".encode(), b"x" * 9000))


@mood
def another_file_by_its_etag(bad: Bad) -> None:
    bad.always(bad.large, to(f"/{bad.cdn}", X_Linked_Etag=f'"{"0" * 64}"'))


@mood
def the_commit_goes(bad: Bad) -> None:
    bad.always(bad.tree, lambda handler: bool(bad.hub.repositories[REPO].commits.pop(bad.commit, None)) and reply(
        entries("floe.json", "config.json"))(handler))


@mood
def no_ranges(bad: Bad) -> None:
    bad.hub.ranges = False


@mood
def no_ranges_and_always_cut(bad: Bad) -> None:
    bad.always(bad.cdn, raw(OPEN.replace(b"\r\n\r\n", b"\r\nContent-Length: 307200\r\n\r\n") + DATA[:9000]),
               raw(OPEN.replace(b"\r\n\r\n", b"\r\nContent-Length: 307200\r\n\r\n") + DATA[:4000]))


@mood
def slow(bad: Bad) -> None:
    bad.hub.pause = 0.02


@mood
def it_stalls_now_and_then(bad: Bad) -> None:
    bad.hub.fault(bad.cdn, raw(b"HTTP/1.1 206 x\r\nContent-Length: 307200\r\n\r\n" + DATA[:70_000], b"", 0),
                  lambda handler: time.sleep(0.6) or False)


@pytest.mark.parametrize("manifest", [
    b"", b"[]", b"{}", b"[" * 90_000, b'{"files": 7}', b'{"files": [7]}',
    MANIFEST.replace(NAME.encode(), b"../../../outside.json"), MANIFEST.replace(b"307200", b"9"),
    MANIFEST.replace(b'"path"', b'"Path"')])
def test_a_manifest_that_is_none(tmp_path, manifest):
    with LoopbackHub() as hub:
        hub.add(REPO, FILES | {"floe.json": manifest})
        with pytest.raises(UserError) as caught:
            download(REPO, data=tmp_path, hub=Hub(hub.endpoint, token="hf_secret"))
    assert_sentence(caught.value)


def assert_sentence(error: Exception) -> None:
    text = str(error)
    assert text.isprintable() and text.endswith(".") and len(text) < 400, text


def whole(data: Path) -> bool:
    folder = data / "models" / "model"
    return folder.is_dir() and all((folder / name).read_bytes() == content for name, content in FILES.items())


def attempt(data: Path, endpoint: str) -> None:
    """Whole and right, or one sentence; soon, and in little memory."""
    begun = time.monotonic()
    tracemalloc.start()
    try:
        download(REPO, data=data, hub=Hub(endpoint, "hf_secret", timeout=0.5, delays=(0.01,) * 2, listing_seconds=1))
        assert whole(data)
    except (UserError, MachineError) as error:
        assert_sentence(error)
        assert not (data / "models" / "model").exists()
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < BYTES and time.monotonic() - begun < SECONDS


@pytest.mark.parametrize("name", MOODS)
def test_a_mood(name, tmp_path, capfd):
    data = tmp_path / "deep" / "data"
    with LoopbackHub() as hub, LoopbackHub() as foreign:
        MOODS[name](Bad(hub, foreign))
        attempt(data, hub.endpoint)
        assert all(token is None for _, token in foreign.tokens_seen)
        assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parents[1] != data / "models"] == []
    assert capfd.readouterr().out == ""
    if any(model.kind == "unfinished" for model in models(data)):
        delete("model", data)
    with LoopbackHub() as good:
        good.add(REPO, FILES)
        download(REPO, data=data, hub=Hub(good.endpoint))
        assert whole(data)


def test_afterwards_the_same_program_answers():
    with Engine.open(demo_model(), Options(device="cpu")) as engine:
        events = list(engine.chat([{"role": "user", "content": "Hello!"}], Sampling(temperature=0, max_tokens=5)))
    assert events[-1].reason in ("stop", "length")


def test_the_moods_are_many():
    assert len(MOODS) >= 36
