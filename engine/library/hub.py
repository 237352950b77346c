"""Files from a Hub, resumable: what a repository holds at one commit, and one file of it at a time.

Session, headers, addresses and errors are the client library's; the transfer is ours, because it has to stop within a
second, to say what it waits for, and to go on behind what arrived before a kill. The API stays at the endpoint, files
come from the endpoint's own hosts, the token goes nowhere but to the endpoint, and listings are bounded. Bytes are
asked for chunk by chunk and written to `NAME.part` as they arrive, so at most one chunk is ever in flight; a file gets
its name only when its size and hash are those of the listing. Nothing but weights in safe formats, JSON, tokenizers and
texts is fetched. Knows no model. Loads no torch, and the client library only when it is used.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from threading import Event, Lock
from urllib.parse import quote, unquote, urljoin, urlsplit

from engine.core import MachineError, Stopped, UserError
from engine.disk import writing
from engine.library.network import MIRROR, allowed_hosts, check_token, check_variables, mirror
from engine.progress import unless

PIECE_BYTES = 1 << 20
CHUNK_BYTES = 64 << 20
STEP_BYTES = 16 << 10           # of a file, that must arrive for the tries to begin anew
MAX_REDIRECTS = 5
MOST_PAGES, MOST_FILES, DOCUMENT_BYTES, LISTING_SECONDS = 50, 20_000, 4 << 20, 60.0
SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".tiktoken", ".txt", ".md")
BARE_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
# The public Hub sends the bytes of large files from these domains, and so do its mirrors.
PUBLIC_DOMAINS = ("huggingface.co", "hf.co")
DELAYS = (1, 2, 4, 8, 16)
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. sha256: of large files; git_hash: of small ones (sha1 of `blob SIZE\\0` and bytes)."""

    path: str
    bytes: int
    sha256: str | None = None
    git_hash: str | None = None

    def __post_init__(self) -> None:
        """UserError for names that some disk cannot hold, or that a person cannot read."""
        parts = PurePosixPath(self.path).parts if isinstance(self.path, str) else ()
        plain = parts and "/".join(parts) == self.path and self.path.isprintable()
        plain = plain and not set(self.path) & set('\\:*?"<>|')
        if not plain or any(part == ".." or part[-1] in ". " or len(part.encode()) > 240 for part in parts):
            raise UserError(f"The repository names a file {str(self.path)[:100]!r}, which not every disk can hold; "
                            "choose another source.")
        hashes = all(isinstance(each, str | None) for each in (self.sha256, self.git_hash))
        if not (type(self.bytes) is int and 0 <= self.bytes < 1 << 63 and hashes):
            raise UserError(f"The repository gives {self.path} no true size or hash; it is damaged.")

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def fetchable(self) -> bool:
        """Weights in safe formats, JSON, tokenizers and texts: what may be fetched at all."""
        return self.name.endswith(SUFFIXES) or self.name in BARE_NAMES


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit; a branch may move on, this does not. base_model: the repository that its
    card names as its origin, "" where there is none."""

    repository: str
    commit: str
    files: tuple[RemoteFile, ...]
    base_model: str = ""

    def find(self, path: str) -> RemoteFile | None:
        return next((file for file in self.files if file.path == path), None)


@dataclass(frozen=True)
class Hub:
    """A Hub or a mirror of it. token None: the one that the client library has stored, if any.

    hosts: from which files may come besides the Hub's own. timeout: seconds without a byte before a connection counts
    as lost. delays: seconds to wait before each new try; the tries begin anew whenever something has arrived.
    listing_seconds: for all pages of a listing together.
    """

    endpoint: str
    token: str | None = None
    timeout: float = 10.0
    delays: tuple[float, ...] = DELAYS
    chunk_bytes: int = CHUNK_BYTES
    listing_seconds: float = LISTING_SECONDS
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.token is not None:
            check_token(self.token, "The token")
        try:
            there = re.match("https?://", self.endpoint) and self.host
        except ValueError:              # half a bracket
            there = None
        if not there:
            raise UserError(f"HF_ENDPOINT is {self.endpoint!r}; write an address like https://huggingface.co, or unset "
                            "it.")

    @staticmethod
    def here(token: str | None = None, hosts: tuple[str, ...] = (), data: str | Path | None = None) -> Hub:
        """The Hub that HF_ENDPOINT names, or that the settings do, else the public one. hosts: allowed besides those
        that are kept in the data folder. UserError when the network is switched off, or what this computer says of it
        cannot be."""
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise UserError("The network is switched off (HF_HUB_OFFLINE is set): only models on this disk can be "
                            "used; unset it to download.")
        check_variables()
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            if token is None and (stored := os.environ.get(name, "").strip()):
                check_token(stored, f"The variable {name}")
        return Hub(endpoint(data), token, hosts=(*hosts, *allowed_hosts(data)))

    @staticmethod
    def waited_for(data: str | Path | None = None) -> Hub:
        """As `here`, for somebody who looks at the page meanwhile: it is asked a second time at most."""
        return replace(Hub.here(data=data), delays=(1,))

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint).hostname or ""

    def listing(self, repository: str, revision: str = "main", stop: Event | None = None) -> Listing:
        """The files of a repository at the commit that `revision` means now."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise UserError(f"{repository!r} is not a Hub id; write it like owner/name.") from error
        return self._patiently(repository, stop or Event(), lambda: self._listed(repository, revision))

    def asked(self, path: str, what: str, kind: type):
        """The JSON at a path of the API, of that kind. what: its name in a sentence, should it fail."""
        def ask():
            found = next(self._documents(f"{self.endpoint}/api/{path}"))
            if not isinstance(found, kind):
                raise ValueError("not an answer to that")
            return found
        return self._patiently(what, Event(), ask)

    def _listed(self, repository: str, revision: str) -> Listing:
        place, files = f"{self.endpoint}/api/models/{repository}", []
        info = next(self._documents(f"{place}/revision/{quote(revision, safe='')}"))
        if not re.fullmatch("[0-9a-f]{7,64}", info["sha"]):
            raise ValueError("not a commit")
        for page in self._documents(f"{place}/tree/{info['sha']}?recursive=True&expand=False"):
            files += [_remote_file(item) for item in page if item["type"] == "file"]
            if len(files) > MOST_FILES:
                raise UserError(f"{repository} lists more than {MOST_FILES:,} files, as no model does; choose another "
                                "source.")
        return Listing(repository, info["sha"], tuple(files), _base_model(info.get("cardData") or {}))

    def _documents(self, url: str) -> Iterator:
        """The JSON at an address of the API, and of the pages that follow it."""
        endless = MachineError(f"The listing of {self.host} has no end; try again later or choose another source.")
        ends = time.monotonic() + self.listing_seconds
        for _ in range(MOST_PAGES):
            body = bytearray()
            with self._answer(url) as response:
                for piece in response.iter_raw():
                    body += piece
                    if len(body) > DOCUMENT_BYTES or time.monotonic() > ends:
                        raise endless
            yield json.loads(body)
            following = response.links.get("next", {}).get("url")
            if not following:
                return
            url = self._allowed(urljoin(url, following))
        raise endless

    def fetch(self, listing: Listing, file: RemoteFile, dest: Path, report: Callable[[int, str], None],
              stop: Event | None = None, up_to: int | None = None) -> None:
        """`dest`, whole and verified; goes on behind what `dest.part` holds. Nothing to do if `dest` is there. up_to:
        so many bytes from the beginning are enough for now; of a larger file they lie in `dest.part`.

        report(n_bytes, text): n_bytes more have arrived; text says what is wrong while waiting, else "".
        Stopped when `stop` is set. UserError or MachineError in one sentence; the part stays unless it is damaged.
        """
        from huggingface_hub import hf_hub_url
        if not file.fetchable:
            raise UserError(f"{file.path} is not a file that Floe Chat fetches.")
        if dest.is_file() and dest.stat().st_size == file.bytes:
            return
        part, stop = dest.with_name(dest.name + ".part"), stop or Event()
        url = hf_hub_url(listing.repository, file.path, revision=listing.commit, endpoint=self.endpoint)
        with writing(part, keep=True):
            with _Part(part, file, report, stop) as out:
                wanted = min(file.bytes, up_to or file.bytes)
                while out.have < wanted:
                    self._patiently(listing.repository, stop, lambda: self._transfer(url, out, wanted), out)
                os.fsync(out.fileno())
            if out.have < file.bytes:
                return
            if not out.is_right():
                part.unlink()
                raise MachineError(f"{file.name} arrived damaged and was removed; start again.")
            os.replace(part, dest)

    def _transfer(self, url: str, out: _Part, wanted: int) -> None:
        """One request: from where we are, at most a chunk. Raises the session's errors when it breaks off."""
        from huggingface_hub.errors import HTTPError
        end = min(out.have + self.chunk_bytes, wanted)
        with self._answer(url, out, end) as response:
            if response.status_code == 200 and out.have:
                out.start_over()
            for piece in response.iter_raw():
                out.write(piece)
        if out.have < end:
            raise HTTPError("the answer ended before the file")

    @contextmanager
    def _answer(self, url: str, out: _Part | None = None, end: int = 0) -> Iterator:
        """One GET as a stream, its redirects followed by hand. out: the file, fetched up to `end`, or None."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers
        wanted = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={out.have}-{end - 1}"} if out else {})
        for _ in range(MAX_REDIRECTS):
            at_home = _origin(url) == _origin(self.endpoint)
            headers = build_hf_headers(token=self.token if at_home else False) | wanted
            with get_session().stream("GET", url, headers=headers, timeout=self.timeout,
                                      follow_redirects=False) as response:
                if response.status_code >= 400:
                    response.raise_for_status()
                if not response.has_redirect_location:
                    self._check(response, out)
                    yield response
                    return
                if out:
                    out.check_etag(response.headers.get("X-Linked-Etag", ""))
                url = self._allowed(urljoin(url, response.headers["Location"]), out)
        raise MachineError(f"{self.host} sends the request in circles; try again later.")

    def _allowed(self, target: str, out: _Part | None = None) -> str:
        """UserError for an address away from the endpoint's hosts, of the API away from the endpoint itself."""
        there, home = urlsplit(target), urlsplit(self.endpoint)
        if not (target.isascii() and target.isprintable() and len(target) < 8000) or "@" in there.netloc:
            raise ValueError("not an address")
        domains = (home.hostname, *PUBLIC_DOMAINS, *self.hosts)
        inside = any(f".{there.hostname}".endswith(f".{domain}") for domain in domains)
        if _origin(target) != _origin(self.endpoint) and not (
                out and inside and there.scheme in ("https", home.scheme)):
            raise UserError(f"{self.host} sends the request on to {there.scheme}://{there.netloc[-80:]}, which is not "
                            "its own; nothing was fetched. If you trust it, allow this host in the settings, with "
                            "--allow-host, or in FLOECHAT_HOSTS.")
        return target

    def _check(self, response, out: _Part | None) -> None:
        """An answer that is no document, is packed (which was not asked for), or speaks of another size."""
        ranged = out is not None and response.status_code == 206
        if not (ranged or response.status_code == 200) or response.headers.get("Content-Encoding", "") not in (
                "", "identity"):
            raise self._no_hub()
        if out:
            found = response.headers.get("Content-Range", "").rpartition("/")[2] if ranged else (
                response.headers.get("Content-Length", ""))
            if found not in ("", "*", str(out.file.bytes)):
                raise out.changed(found)

    def _no_hub(self) -> MachineError:
        return MachineError(f"{self.host} gave an answer that is not a Hub's; check the mirror (Settings, Downloads, "
                            "or HF_ENDPOINT) and the network.")

    def _patiently(self, repository: str, stop: Event, work: Callable, out: _Part | None = None):
        """work(), again and again while the trouble may pass; what will not pass becomes a sentence at once."""
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
        tries = most = 0
        while True:
            try:
                return unless(stop.is_set, work)
            except OfflineModeIsEnabled as error:
                raise UserError("The network is switched off (HF_HUB_OFFLINE is set): unset it to download.") from error
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise self._no_hub() from error
            except HTTPError as error:
                self._give_up_if_final(repository, error)
                tries, most = (0, out.have) if out and out.have >= most + STEP_BYTES else (tries, most)
                if tries == len(self.delays):
                    raise MachineError(f"{self.host} cannot be reached or keeps failing ({_reason(error)}); check the "
                                       "network and start again: it goes on where it was.") from error
                delay = max(self.delays[tries], _asked_for(error))
                if out:
                    out.report(0, f"{_reason(error).capitalize()}; next try in {delay:.0f} s")
                if stop.wait(delay):
                    raise Stopped from error
                tries += 1

    def _give_up_if_final(self, repository: str, error: Exception) -> None:
        response = getattr(error, "response", None)
        if response is None:
            return
        status, code = response.status_code, response.headers.get("X-Error-Code")
        if status == 403 or code == "GatedRepo":
            raise UserError(f"{repository} is open only to those who accepted its licence: do so on "
                            f"{self.endpoint}/{repository} and give your token (hf auth login, or --token).") from error
        if status == 401:
            raise UserError(f"{repository} does not exist on {self.host}, or needs a token: check the name, or log "
                            "in with hf auth login.") from error
        if code == "RevisionNotFound":
            raise UserError(f"{repository} has no such revision; choose another.") from error
        if status == 404:
            raise UserError(f"{repository}, or a file of it, does not exist on {self.host} any more or never did; "
                            "check the name.") from error
        if status < 500 and status not in (408, 425, 429):
            raise UserError(f"{self.host} refused the request for {repository} ({status}).") from error


class _Part(io.FileIO):
    """`NAME.part`: what has arrived, counted and hashed, at most as large as the file.

    Once closed it takes no more, though a thread that was left alone may still come with bytes.
    """

    def __init__(self, path: Path, file: RemoteFile, report: Callable[[int, str], None], stop: Event) -> None:
        size = path.stat().st_size if path.exists() else 0
        if size > file.bytes:
            path.unlink()
        super().__init__(path, "a+")
        self.file, self.report, self.stop, self.lock = file, report, stop, Lock()
        self._forget()
        self.seek(0)
        while self.have < size <= file.bytes:
            self._count(self.read(PIECE_BYTES))

    def _forget(self) -> None:
        self.have, self.digest = 0, hashlib.sha256() if self.file.sha256 else hashlib.sha1(
            f"blob {self.file.bytes}\0".encode(), usedforsecurity=False)

    def _count(self, piece: bytes) -> None:
        self.digest.update(piece)
        self.have += len(piece)

    def write(self, piece: bytes) -> None:
        view = memoryview(piece)
        if self.have + len(view) > self.file.bytes:
            raise self.changed()
        while view:
            with self.lock:
                if self.closed or self.stop.is_set():
                    raise Stopped
                written = super().write(view)
                self._count(view[:written])
            self.report(written, "")
            view = view[written:]

    def start_over(self) -> None:
        """The server has no ranges: it sends everything again."""
        with self.lock:
            if self.closed:
                raise Stopped
            self.truncate(0)
        self.report(-self.have, "")
        self._forget()

    def close(self) -> None:
        with self.lock:
            super().close()

    def is_right(self) -> bool:
        return (self.file.sha256 or self.file.git_hash) in (None, self.digest.hexdigest())

    def check_etag(self, etag: str) -> None:
        named = etag.removeprefix("W/").strip('"')
        if self.file.sha256 and len(named) == 64 and named != self.file.sha256:
            raise self.changed()

    def changed(self, found: str = "") -> MachineError:
        """found: the size that an answer speaks of."""
        size = f" has {int(found):,} bytes at the Hub instead of {self.file.bytes:,}; it" if found.isdecimal() and len(
            found) < 20 else ""
        return MachineError(f"{self.file.name}{size} was changed at the Hub or is damaged: delete the unfinished "
                            "download and start again.")


def endpoint(data: str | Path | None = None) -> str:
    """Of the Hub that HF_ENDPOINT names, or that a person has chosen, else of the public one."""
    return (os.environ.get(MIRROR) or mirror(data) or "https://huggingface.co").rstrip("/")


def address(text: str) -> tuple[str, str] | None:
    """(repository, file or "") that a person's `owner/name`, or an address copied from a browser or another
    program, means; None for other words. UserError for an address of the Hub that is no model's."""
    words = re.sub(r"^(?:ollama (?:run|pull)|(?:hf|huggingface-cli) download)\s+", "", text)
    found = re.fullmatch(r"(?:https?://)?([^/\s]+)/([^\s?#]+?)/*(?:[?#]\S*)?", words)
    hosts = {urlsplit(endpoint()).netloc, *PUBLIC_DOMAINS, *(f"www.{domain}" for domain in PUBLIC_DOMAINS)}
    if not found or found[1].startswith((".", "~")):
        return None
    if found[1] not in hosts:
        return (words, "") if REPOSITORY.fullmatch(words) else None
    owner, _, rest = found[2].partition("/")
    name, _, rest = rest.partition("/")
    name, _, tag = name.partition(":")
    if owner in ("datasets", "spaces", "collections", "papers", "docs", "blog") or not name:
        raise UserError(f"{text[:100]} is not the address of a model; give one like "
                        f"{endpoint()}/owner/name.")
    kind, _, path = rest.partition("/")
    file = path.partition("/")[2] if kind in ("blob", "resolve") else tag
    return f"{owner}/{name}", unquote(file)


def _origin(url: str) -> tuple:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _base_model(card: dict) -> str:
    """What the repository's card says it was made from; written by anyone, so only a plain name counts."""
    named = card.get("base_model")
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) and first.count("/") == 1 else ""


def _remote_file(item: dict) -> RemoteFile:
    large = item.get("lfs")
    return RemoteFile(item["path"], large["size"], large["oid"]) if large else RemoteFile(
        item["path"], item["size"], None, item["oid"])


def _asked_for(error: Exception) -> int:
    """Seconds that the server asks to wait, at most a minute."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(int(asked), 60) if asked.isdecimal() and len(asked) < 9 else 0


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 429:
        return "too many requests"
    if status:
        return f"error {status}"
    return "no answer in time" if "Timeout" in type(error).__name__ else "the connection was lost"
