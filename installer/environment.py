"""The private Python environment: made once below .app/, stamped when whole, made anew when its pins change.

An environment is named by a hash of its pins, so an update builds the new one beside the old, which is kept for going
back. Only a stamp, written last, makes an environment count: what a kill, a full disk or a lost network left behind is
thrown away and built again, with pip's cache below .app/cache as far as the index lets downloads be cached. pip does
the installing, with the computer's own configuration (indexes, proxies, certificates): torch last, first as pip is
configured, then with PyTorch's index beside.
Knows nothing of graphics cards and of the program that will run in it.
"""
from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from installer.screen import Screen, Trouble

FORMAT = 1  # of the environment's making; a change makes every environment anew
NEED_CPU_BYTES = 4 << 30  # measured: 1.4 GiB, with the tests' packages 2.3 GiB, and the downloads
NEED_CUDA_BYTES = 10 << 30  # 3 GB of downloads, 7 to 8 GB unpacked
# Of pip's options those that say how an index is reached; all others stay outside.
WAY_TO_THE_INDEX = ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "TRUSTED_HOST", "CERT",
                    "CLIENT_CERT", "PROXY", "TIMEOUT", "DEFAULT_TIMEOUT", "RETRIES", "KEYRING_PROVIDER",
                    "USE_DEPRECATED", "CONFIG_FILE")
FULL_BYTES = 16 << 20  # less than this free after a failure: that was the reason
A_DAY = 24 * 3600  # seconds
PAUSES = (5, 20)  # seconds before each new try of what a network has broken; pip itself tries each file five times
# What pip says when the way to the index is at fault.
UNREACHABLE = (r"NewConnectionError|ConnectionError|name resolution|[Rr]ead timed out|ConnectTimeout|ProxyError|"
               r"SSLError|onnection broken|Connection aborted|IncompleteRead|RemoteDisconnected|"
               r"HTTP error (?:429|5\d\d)|too many \d+ error responses")
SENTENCES = {
    "No space left on device|not enough space":
        "The disk is full. Make room and start again.",
    "Missing dependencies for SOCKS support|Unknown scheme|Unsupported proxy|Not supported proxy scheme":
        "The variable {proxy} names a proxy that cannot be used here. Set it to an http:// address, or unset it.",
    "Could not find a suitable TLS CA certificate bundle|invalid path: .*certificate":
        "The variable {certificate} names a file of certificates that is not there. Correct it, or unset it.",
    "DO NOT MATCH THE HASHES":
        "A downloaded package is not the one that this release was made with, so it was not installed. Your network or "
        "package mirror may have changed it; try again later.",
    UNREACHABLE: "The package index cannot be reached. Check the connection and start again.",
}


class Passing(Trouble):
    """May be over in a moment."""


@dataclass(frozen=True)
class Recipe:
    """What goes into an environment. name: cpu, cu126, cu130, tests; torch: its pins; locks: hashed pins."""

    name: str
    torch: Path
    locks: tuple[Path, ...]

    def tag(self) -> str:
        """name-hash: the same tag means the same packages for the same Python."""
        digest = hashlib.sha256(f"{FORMAT} {sys.version_info[:2]} {sys.platform} {base_python()}".encode())
        for file in (self.torch, *self.locks):
            digest.update(file.read_bytes())
        return f"{self.name}-{digest.hexdigest()[:12]}"


def torch_pins(folder: Path, backend: str) -> Path:
    """With hashes where the build is the package index's own; PyTorch's index is asked for the others by name."""
    own = (backend, sys.platform) in (("cu130", "linux"), ("cpu", "darwin"))
    return folder / ("torch.lock" if own else f"torch-{backend}.txt")


@dataclass(frozen=True)
class Environment:
    """A whole environment. cc: the C compiler to hand to Triton, where the computer has none."""

    folder: Path
    cc: str | None = None

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    def variables(self, cache: Path) -> dict[str, str]:
        """Environment variables for a program that runs here: nothing of the user's other Pythons, caches inside."""
        variables = clean_variables(cache)
        variables.pop("PIP_CACHE_DIR")
        if self.cc:
            variables["CC"] = self.cc
        return variables


def ready(app: Path, recipe: Recipe) -> Environment | None:
    """The environment of this recipe if it is stamped and no file of it has gone since."""
    return _stamped(app, _stamp(app, recipe.tag()))


def previous(app: Path) -> Environment | None:
    """The newest whole environment of any earlier release, to go back to."""
    for stamp in _stamps(app):
        environment = None if stamp.name.startswith("tests-") else _stamped(app, stamp)
        if environment:
            return environment
    return None


def build(app: Path, recipe: Recipe, screen: Screen, finish: Callable[[Environment], str | None] | None = None
          ) -> Environment:
    """Make the environment of this recipe. `finish` may add to it, and returns the C compiler if it put one in."""
    _check_disk(app, recipe)
    tag = recipe.tag()
    environment = Environment(app / tag)
    _stamp(app, tag).unlink(missing_ok=True)
    shutil.rmtree(environment.folder, ignore_errors=True)
    screen.say("Installing what Floe Chat needs (only the first time, a few minutes) ...")
    _run([base_python(), "-m", "venv", str(environment.folder)], app, screen)
    hashed = recipe.torch.suffix == ".lock"
    for lock in (*recipe.locks, recipe.torch) if hashed else recipe.locks:
        install(environment, ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", str(lock)], app, screen)
    if not hashed:
        _install_torch(environment, recipe.torch, app, screen)
    cc = finish(environment) if finish else None
    _write_stamp(app, tag, environment, cc)
    _prune(app, tag)
    return Environment(environment.folder, cc)


def install(environment: Environment, arguments: list[str], app: Path, screen: Screen) -> None:
    """pip install in the environment, again after a pause where the network is at fault; Trouble with a sentence that
    names the likely cause."""
    # Modules are compiled when first used: compiling all of them takes longer than unpacking them.
    command = [str(environment.python), "-m", "pip", "install", "--no-compile", *arguments]
    variables = pip_variables(environment.python, app / "cache")
    for pause in PAUSES:
        try:
            return _run(command, app, screen, variables)
        except Passing as trouble:
            screen.log(f"{trouble} Trying again in {pause} s.")
            screen.progress(f"The network has a problem; trying again in {pause} s ...")
            time.sleep(pause)
    _run(command, app, screen, variables)


def clean_variables(cache: Path) -> dict[str, str]:
    """This process's variables without those that let another Python leak in, and with every cache below `cache`."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PYTHONSTARTUP", "PYTHONPYCACHEPREFIX",
               "PYTHONDONTWRITEBYTECODE",  # every start would compile every module: 3 s more
               "PYTHONOPTIMIZE", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items()
            if name not in dropped and (not name.upper().startswith("PIP_") or name.upper()[4:] in WAY_TO_THE_INDEX)}
    (cache / "tmp").mkdir(parents=True, exist_ok=True)  # the system's own may be a small RAM disk
    temporary = {name: str(cache / "tmp") for name in ("TMPDIR", "TEMP", "TMP")}
    return kept | temporary | {
        "PYTHONNOUSERSITE": "1", "PYTHONUTF8": "1", "PIP_USER": "0", "PIP_NO_INPUT": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_RESUME_RETRIES": "5", "PIP_CACHE_DIR": str(cache / "pip"),
        "TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "MPLCONFIGDIR": str(cache / "matplotlib")}


def clear_temporary(cache: Path) -> None:
    """Remove what programs that were killed left in their temporary folder. For the holder of the lock; a check, which
    takes none, may be at work on what is younger than a day."""
    for path in (cache / "tmp").glob("*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > A_DAY:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def pip_variables(python: Path | str, cache: Path) -> dict[str, str]:
    """As `clean_variables`, with what pip's own files say of the way to an index. What else they say (a target, a
    constraint, a dry run) is for the person's other environments, and would leave ours without its packages."""
    variables = clean_variables(cache)
    listed = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True,
                            errors="replace", env=variables, stdin=subprocess.DEVNULL)
    of_files = {}
    for line in listed.stdout.splitlines():  # sorted: [install] comes behind [global], and goes before it in pip
        found = re.fullmatch(r"(global|install)\.([\w-]+)=(.*)", line)
        name = found and found[2].upper().replace("-", "_")
        if name in WAY_TO_THE_INDEX and found[3]:
            with suppress(ValueError, SyntaxError):
                of_files[f"PIP_{name}"] = str(ast.literal_eval(found[3]))
    return of_files | variables | {"PIP_CONFIG_FILE": os.devnull}


def _install_torch(environment: Environment, pins: Path, app: Path, screen: Screen) -> None:
    """First as the computer's pip is configured (a mirror may have this very build), then with PyTorch's own index."""
    lines = [line for line in pins.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    own = app / "torch-pins.txt"
    own.write_text("\n".join(line for line in lines if not line.startswith("--")), encoding="utf-8")
    try:
        install(environment, ["-r", str(own)], app, screen)
    except Trouble as trouble:
        screen.log(f"not from the configured index: {trouble}")
        install(environment, ["-r", str(pins)], app, screen)


def _run(command: list[str], app: Path, screen: Screen, variables: dict[str, str] | None = None) -> None:
    """A step of the installation: output to the log, what it is busy with to the window."""
    screen.log("$ " + " ".join(command))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               stdin=subprocess.DEVNULL, env=variables or clean_variables(app / "cache"))
    lines = []
    for line in process.stdout:
        lines.append(line)
        screen.log(line)
        busy = re.match(r"\s*(Collecting|Downloading|Installing collected packages)(?: ([\w.\[\]-]+))?", line)
        if busy:
            screen.progress(f"{'Unpacking ...' if busy[1].startswith('Inst') else busy[1]} {busy[2] or ''}")
    if process.wait():
        full = shutil.disk_usage(app).free < FULL_BYTES  # venv keeps its reason to itself
        raise why("No space left on device" if full else "".join(lines))


def why(output: str) -> Trouble:
    """The sentence for what pip said when it failed."""
    for sign, sentence in SENTENCES.items():
        if re.search(sign, output):
            return Passing(sentence) if sign is UNREACHABLE else Trouble(_with_names(sentence))
    found = re.search(r"No matching distribution found for (\S+)", output)
    if found:  # an index page that could not be fetched looks like one that lists nothing
        kind = Passing if "(from versions: none)" in output else Trouble
        return kind(f"The package index has no {found[1]} for this system and Python {sys.version.split()[0]}; "
                    "Python 3.12 is the safest choice.")
    return Trouble("Installing failed, and why is not known; the log has what pip said. Start again, or "
                   "with --repair.")


def _with_names(sentence: str) -> str:
    """With the variables of this computer that the sentence is about, and what they hold."""
    return sentence.format(proxy=_set("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "PIP_PROXY", of="for a proxy"),
                           certificate=_set("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT",
                                            of="for certificates"))


def _set(*names: str, of: str) -> str:
    found = [f"{name}={value}" for name, value in os.environ.items() if name.upper() in names and "@" not in value]
    return " or ".join(found) or of


def _check_disk(app: Path, recipe: Recipe) -> None:
    need = NEED_CPU_BYTES if recipe.torch.stem == "torch-cpu" else NEED_CUDA_BYTES
    free = shutil.disk_usage(app).free
    if free < need:
        raise Trouble(f"Not enough room: {need / 1e9:.1f} GB are needed in {app.parent}, {free / 1e9:.1f} GB are free. "
                      "Make room or move the Floe Chat folder to a larger disk.")


def _write_stamp(app: Path, tag: str, environment: Environment, cc: str | None) -> None:
    stamp = _stamp(app, tag)
    stamp.parent.mkdir(exist_ok=True)
    partial = stamp.with_suffix(".part")
    partial.write_text(json.dumps({"n_files": _count_files(environment.folder), "cc": cc}), encoding="utf-8")
    os.replace(partial, stamp)


def _stamp(app: Path, tag: str) -> Path:
    return app / "ready" / f"{tag}.json"


def _stamps(app: Path) -> list[Path]:
    """Newest first."""
    return sorted((app / "ready").glob("*.json"), key=lambda stamp: stamp.stat().st_mtime, reverse=True)


def _stamped(app: Path, stamp: Path) -> Environment | None:
    try:
        document = json.loads(stamp.read_text(encoding="utf-8"))
        environment = Environment(app / stamp.stem, document["cc"])
        whole = environment.python.exists() and _count_files(environment.folder) >= document["n_files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return environment if whole else None


def _count_files(folder: Path) -> int:
    """Files but compiled modules, which come and go."""
    count = 0
    for _, folders, files in os.walk(folder):
        if "__pycache__" in folders:
            folders.remove("__pycache__")
        count += len(files)
    return count


def _prune(app: Path, tag: str) -> None:
    """Keep this environment and the newest other one of its kind; remove older ones and what was never finished."""
    tests = tag.startswith("tests-")
    kind = [stamp.stem for stamp in _stamps(app) if stamp.stem.startswith("tests-") == tests]
    kept = {tag, *[name for name in kind if name != tag][:1 if not tests else 0]}
    for folder in app.glob("*-????????????"):
        if folder.name.startswith("tests-") == tests and folder.name not in kept:
            _stamp(app, folder.name).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def base_python() -> str:
    """The Python below any virtual environment, so that one environment never rests on another."""
    return getattr(sys, "_base_executable", None) or sys.executable
