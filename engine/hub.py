"""Files from a Hub, resumable: what a repository holds at one commit, and one file of it at a time.

Built on the client library's own session, headers, addresses and errors; the transfer itself is ours, because a file
must go on where it was after a kill. Bytes are asked for chunk by chunk and written to `NAME.part` as they arrive, so
at most one chunk is ever in flight; a file gets its name only when its size and hash are those of the listing. Nothing
but weights in safe formats, JSON, tokenizers and texts is fetched, and a redirect is followed to the endpoint's own
hosts alone. Knows no model. Loads no torch, and the client library only when it is used.
"""
from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event
from urllib.parse import urljoin, urlsplit

from engine.spec import MachineError, Stopped, UserError

PIECE_BYTES = 1 << 20
CHUNK_BYTES = 64 << 20
MAX_REDIRECTS = 5
SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".tiktoken", ".txt", ".md")
BARE_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
# The public Hub sends the bytes of large files from these domains, and so do its mirrors.
PUBLIC_DOMAINS = ("huggingface.co", "hf.co")
DELAYS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. sha256: of large files; git_hash: of small ones (sha1 of `blob SIZE\\0` and bytes)."""

    path: str
    bytes: int
    sha256: str | None = None
    git_hash: str | None = None

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path).parts
        if not parts or self.path.startswith("/") or ".." in parts or set(self.path) & set('\\:*?"<>|\0'):
            raise UserError(f"The repository names the file {self.path!r}, which no honest repository has.")
        if not isinstance(self.bytes, int) or self.bytes < 0:
            raise UserError(f"The repository gives {self.path} the size {self.bytes!r}; it is damaged.")

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

    timeout: seconds without a byte before a connection counts as lost. delays: seconds to wait before each new try;
    the tries begin anew whenever a byte has arrived.
    """

    endpoint: str
    token: str | None = None
    timeout: float = 10.0
    delays: tuple[float, ...] = DELAYS
    chunk_bytes: int = CHUNK_BYTES

    @staticmethod
    def here(token: str | None = None) -> Hub:
        """The Hub that HF_ENDPOINT names, else the public one. UserError when the network is switched off."""
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise UserError("The network is switched off (HF_HUB_OFFLINE is set): only models on this disk can be "
                            "used; unset it to download.")
        return Hub((os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"), token)

    def listing(self, repository: str, revision: str = "main", stop: Event | None = None) -> Listing:
        """The files of a repository at the commit that `revision` means now."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        api = HfApi(endpoint=self.endpoint, token=self.token)
        try:
            info = self._patiently(repository, stop, lambda: api.model_info(
                repository, revision=revision, timeout=self.timeout))
            tree = self._patiently(repository, stop, lambda: list(
                api.list_repo_tree(repository, recursive=True, revision=info.sha)))
        except HFValidationError as error:
            raise UserError(f"{repository!r} is not a Hub id; write it like owner/name.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise MachineError(f"{self.host} gave an answer that is not a Hub's ({type(error).__name__}); check "
                               "HF_ENDPOINT and the network.") from error
        files = tuple(_remote_file(item) for item in tree if hasattr(item, "size"))
        return Listing(repository, info.sha, files, _base_model(info.card_data))

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint).hostname or self.endpoint

    def fetch(self, listing: Listing, file: RemoteFile, dest: Path, tell: Callable[[int, str], None],
              stop: Event | None = None) -> None:
        """`dest`, whole and verified; goes on behind what `dest.part` holds. Nothing to do if `dest` is there.

        tell(n_bytes, text): n_bytes more have arrived; text says what is wrong while waiting, else "".
        Stopped when `stop` is set. UserError or MachineError in one sentence; the part stays unless it is damaged.
        """
        if not file.fetchable:
            raise UserError(f"{file.path} is not a file that Floe Chat fetches.")
        if dest.is_file() and dest.stat().st_size == file.bytes:
            return
        part = dest.with_name(dest.name + ".part")
        with _full_disk(part):
            digest, have = _digest_of(part, file)
            with part.open("ab", buffering=0) as out:
                transfer = _Transfer(self, listing, file, out, digest, have, tell, stop or Event())
                while transfer.have < file.bytes:
                    self._patiently(listing.repository, stop, transfer.next_chunk, transfer)
                os.fsync(out.fileno())
            if not _matches(transfer.digest, file):
                part.unlink()
                raise MachineError(f"{file.name} arrived damaged and was removed; start again.")
            os.replace(part, dest)

    def _patiently(self, repository: str, stop: Event | None, call: Callable, transfer: _Transfer | None = None):
        """call(), again and again while the trouble may pass; what will not pass becomes a sentence at once."""
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
        tries, seen = 0, transfer.have if transfer else 0
        while True:
            if stop is not None and stop.is_set():
                raise Stopped
            try:
                return call()
            except OfflineModeIsEnabled as error:
                raise UserError("The network is switched off (HF_HUB_OFFLINE is set): unset it to download.") from error
            except HTTPError as error:
                self._give_up_if_final(repository, error)
                tries = 0 if transfer and transfer.have != seen else tries
                seen = transfer.have if transfer else 0
                if tries == len(self.delays):
                    raise MachineError(f"{self.host} cannot be reached or keeps failing ({_reason(error)}); check the "
                                       "network and start again: it goes on where it was.") from error
                self._wait(tries, error, stop, transfer)
                tries += 1

    def _wait(self, tries: int, error: Exception, stop: Event | None, transfer: _Transfer | None) -> None:
        headers = getattr(getattr(error, "response", None), "headers", {})
        asked = headers.get("Retry-After", "")
        delay = max(self.delays[tries], min(int(asked), 60) if asked.isdigit() else 0)
        if transfer:
            transfer.tell(0, f"{_reason(error).capitalize()}; next try in {delay:.0f} s")
        if (stop or Event()).wait(delay):
            raise Stopped

    def _give_up_if_final(self, repository: str, error: Exception) -> None:
        from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, GatedRepoError) or status == 403:
            raise UserError(f"{repository} is open only to those who accepted its licence: do so on "
                            f"{self.endpoint}/{repository} and give your token (hf auth login, or --token).") from error
        if status == 401:
            raise UserError(f"{repository} does not exist on {self.host}, or needs a token: check the name, or log "
                            "in with hf auth login.") from error
        if isinstance(error, RevisionNotFoundError):
            raise UserError(f"{repository} has no such revision; choose another.") from error
        if status == 404:
            raise UserError(f"{repository}, or a file of it, does not exist on {self.host} any more or never did; "
                            "check the name.") from error
        if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
            raise UserError(f"{self.host} refused the request for {repository} ({status}).") from error


class _Transfer:
    """The state of one file on its way: bytes that are safely in the part, and their hash."""

    def __init__(self, hub: Hub, listing: Listing, file: RemoteFile, out, digest, have: int, tell, stop: Event) -> None:
        from huggingface_hub import hf_hub_url
        self.hub, self.file, self.out, self.digest, self.have, self.tell, self.stop = (
            hub, file, out, digest, have, tell, stop)
        self.url = hf_hub_url(listing.repository, file.path, revision=listing.commit, endpoint=hub.endpoint)

    def next_chunk(self) -> None:
        """One request: from where we are, at most a chunk. Raises the session's errors when it breaks off."""
        end = min(self.have + self.hub.chunk_bytes, self.file.bytes)
        wanted = {"Range": f"bytes={self.have}-{end - 1}", "Accept-Encoding": "identity"}
        with _Response(self.hub, self.url, wanted, self.file) as response:
            self._check(response)
            for piece in response.iter_raw():
                self._keep(piece[:self.file.bytes - self.have])
                if self.stop.is_set():
                    raise Stopped

    def _check(self, response) -> None:
        """A server without ranges starts over; one that speaks of another size has another file."""
        if response.status_code == 200 and self.have:
            self.out.truncate(0)
            self.tell(-self.have, "")
            self.digest, self.have = _empty_digest(self.file), 0
        found = response.headers.get("Content-Range", "").rpartition("/")[2] if response.status_code == 206 else (
            response.headers.get("Content-Length", ""))
        if found.isdigit() and int(found) != self.file.bytes:
            raise MachineError(f"{self.file.name} has {int(found):,} bytes at the Hub instead of {self.file.bytes:,}; "
                               "it was changed or is damaged: delete the unfinished download and start again.")

    def _keep(self, piece: bytes) -> None:
        view = memoryview(piece)
        while view:
            written = self.out.write(view)
            self.digest.update(view[:written])
            self.have += written
            self.tell(written, "")
            view = view[written:]


class _Response:
    """One GET as a stream, its redirects followed by hand: only to allowed hosts, the token only to the endpoint."""

    def __init__(self, hub: Hub, url: str, headers: dict[str, str], file: RemoteFile) -> None:
        self.hub, self.url, self.headers, self.file = hub, url, headers, file

    def __enter__(self):
        from huggingface_hub import get_session, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers
        for _ in range(MAX_REDIRECTS):
            at_home = _origin(self.url) == _origin(self.hub.endpoint)
            headers = build_hf_headers(token=self.hub.token if at_home else False) | self.headers
            self.stream = get_session().stream("GET", self.url, headers=headers, timeout=self.hub.timeout,
                                               follow_redirects=False)
            response = self.stream.__enter__()
            if not response.has_redirect_location:
                try:
                    if response.status_code >= 400:
                        response.read()
                    hf_raise_for_status(response)
                except BaseException:
                    self.stream.__exit__(None, None, None)
                    raise
                return response
            response.read()                     # an unread answer would cost the connection
            self.stream.__exit__(None, None, None)
            self._check_etag(response.headers.get("X-Linked-Etag", ""))
            self.url = self._allowed(urljoin(self.url, response.headers["Location"]))
        raise MachineError(f"{self.hub.host} sends the request for {self.file.name} in circles; try again later.")

    def __exit__(self, *error) -> None:
        self.stream.__exit__(*error)

    def _allowed(self, target: str) -> str:
        """UserError for a redirect away from the endpoint's hosts, or from https to plain http."""
        host, home = (urlsplit(target).hostname or "").lower(), urlsplit(self.hub.endpoint)
        domains = ((home.hostname or "").lower(), *PUBLIC_DOMAINS)
        inside = any(host == domain or host.endswith("." + domain) for domain in domains)
        if not inside or urlsplit(target).scheme not in ("https", home.scheme):
            raise UserError(f"{self.hub.host} sends the request for {self.file.name} on to {host or target!r}, which "
                            "is not its own; nothing was fetched.")
        return target

    def _check_etag(self, etag: str) -> None:
        named = etag.removeprefix("W/").strip('"')
        if self.file.sha256 and len(named) == 64 and named != self.file.sha256:
            raise MachineError(f"{self.file.name} was changed at the Hub; delete the unfinished download and start "
                               "again.")


def _origin(url: str) -> tuple:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _base_model(card) -> str:
    """What the repository's card says it was made from; written by anyone, so only a plain name counts."""
    named = getattr(card, "base_model", None)
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) and first.count("/") == 1 else ""


def _remote_file(item) -> RemoteFile:
    return RemoteFile(item.path, item.lfs.size if item.lfs else item.size, item.lfs.sha256 if item.lfs else None,
                      None if item.lfs else item.blob_id)


def _empty_digest(file: RemoteFile):
    return hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.bytes}\0".encode(), usedforsecurity=False)


def _matches(digest, file: RemoteFile) -> bool:
    wanted = file.sha256 or file.git_hash
    return wanted is None or digest.hexdigest() == wanted


def _digest_of(part: Path, file: RemoteFile) -> tuple:
    """The hash of what has arrived before, and how much that is. A part longer than the file starts over."""
    digest, have = _empty_digest(file), 0
    if part.is_file() and part.stat().st_size > file.bytes:
        part.unlink()
    if part.is_file():
        with part.open("rb") as found:
            while piece := found.read(PIECE_BYTES):
                digest.update(piece)
                have += len(piece)
    return digest, have


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 429:
        return "too many requests"
    if status:
        return f"error {status}"
    return "no answer in time" if "Timeout" in type(error).__name__ else "the connection was lost"


class _full_disk:
    """Turns a disk that is full or cannot be written to into one sentence; the part stays."""

    def __init__(self, part: Path) -> None:
        self.part = part

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        from huggingface_hub.errors import HTTPError
        if not isinstance(error, OSError) or isinstance(error, HTTPError):
            return
        folder = self.part.parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"The disk of {folder} is full; make room and start again: it goes on where it "
                               "was.") from error
        if error.errno == errno.EFBIG:
            raise MachineError(f"The disk of {folder} cannot hold a file of {self.part.stem}'s size; choose a folder "
                               "on another disk.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{folder} cannot be written to; choose another folder.") from error
        raise MachineError(f"{self.part} cannot be written ({error.strerror}); check the disk.") from error
