"""The launcher, once there is a Python: decide, install what is missing, start the page, show it.

Standard library only. Run by path (`python -I installer/bootstrap.py`) by start.sh, the .bat and the .command.
Everything it makes lies in .app/ beside the packages; the user's data lies where engine/paths.py says, or where --data
said once.
"""
from __future__ import annotations

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    sys.exit("Floe Chat needs Python 3.11 to 3.14, and this is %d.%d." % sys.version_info[:2])  # noqa: UP031

import argparse
import json
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from installer import environment, gpu, instance, places, remove  # noqa: E402
from installer.compiler import add_compiler  # noqa: E402
from installer.screen import Screen, Trouble  # noqa: E402

PINS = ROOT / "installer" / "pins"
# What a start imports. Python compiles a module at its first import, so that the first start would take twice as long.
FIRST_IMPORTS = "import app.server, app.page, engine.chat.engine, uvicorn.protocols.http.auto"


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    app = ROOT / ".app"
    try:
        (app / "logs").mkdir(parents=True, exist_ok=True)
        lock = instance.Lock(app / "run.lock")
    except OSError as error:
        print(f"The folder {ROOT} cannot be written to ({error.strerror}). Move Floe Chat into your own files.")
        return 3
    sys.stdout.reconfigure(errors="replace")
    screen = Screen(app / "logs" / "launcher.log")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the program that was started is ended too
    try:
        if args.uninstall:
            return remove.uninstall(app, lock, screen)
        return _start(args, app, lock, screen)
    except Trouble as trouble:
        return screen.fail(trouble)
    except OSError as error:
        return screen.fail(Trouble(f"{error.strerror or error}: {error.filename or app}. Make room or correct the "
                                   "rights of this folder, then start again."))
    except KeyboardInterrupt:
        screen.say("Stopped. Start again to go on.")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="start.sh", description="Install what is missing and start Floe Chat.")
    parser.add_argument("--repair", action="store_true", help="make the environment anew and look for the card again")
    parser.add_argument("--uninstall", action="store_true", help="remove everything; asks about chats and models")
    parser.add_argument("--cpu", action="store_true", help="use the processor even if there is a graphics card")
    parser.add_argument("--offline", action="store_true", help="never use the network")
    parser.add_argument("--port", type=int, help="the page's port (default: 7860, or a free one)")
    parser.add_argument("--data", metavar="DIR", help="where chats and models go; remembered for the next start")
    parser.add_argument("--lan", action="store_true", help="let other devices of this network in, by a password")
    parser.add_argument("--no-browser", action="store_true", help="print the link instead of opening it")
    return parser


def _start(args: argparse.Namespace, app: Path, lock: instance.Lock, screen: Screen) -> int:
    if not lock.taken and args.repair:
        raise Trouble("Floe Chat is running. Close it first, then repair.", 2)
    if not lock.taken and instance.show_running(app, lock, screen, not args.no_browser):
        return 0
    instance.forget(app)
    environment.clear_temporary(app / "cache")
    (app / "python-path").write_text(environment.base_python() + "\n", errors="replace",
                                     encoding="oem" if sys.platform == "win32" else "utf-8")  # as cmd, as sh reads it
    data = places.data_folder(args.data)
    where = _environment(args, app, screen)
    screen.say("Starting ...")
    command = [str(where.python), "-m", "app", "--no-browser", "--data", str(data)]
    command += ["--port", str(args.port)] if args.port is not None else []
    command += ["--lan"] if args.lan else []
    command += ["--device", "cpu"] if args.cpu else []
    variables = where.variables(app / "cache") | ({"HF_HUB_OFFLINE": "1"} if args.offline else {})
    return instance.run(command, app, lock, screen, not args.no_browser, cwd=ROOT, env=variables)


def _environment(args: argparse.Namespace, app: Path, screen: Screen) -> environment.Environment:
    """The environment for this computer: the one that is there, a new one, or the previous one if that fails."""
    choice = _choice(args, app)
    screen.say(choice.sentence)
    recipe = environment.Recipe(choice.backend, environment.torch_pins(PINS, choice.backend),
                                (PINS / "requirements.lock",))
    whole = None if args.repair else environment.ready(app, recipe)
    if whole:
        return whole
    try:
        if args.offline:
            raise Trouble("Floe Chat is not installed yet, and --offline forbids downloads. Start it once without.")
        made = environment.build(app, recipe, screen,
                                 lambda made: _finished(made, choice.backend, app, screen))
    except Trouble as trouble:
        return _go_back(app, trouble, screen)
    _self_check(made, app, screen)
    return made


def _finished(made: environment.Environment, backend: str, app: Path, screen: Screen) -> str | None:
    """An environment is ready when what a start imports can be imported: pip may say that all is well and not be right.
    -> the C compiler, if one was put in."""
    compiler = add_compiler(made, backend, PINS, app, screen)
    done = _run_inside(made, app, "-c", FIRST_IMPORTS)
    screen.log(done.stdout)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["it ended without a word"])[-1][:200]
        raise Trouble(f"The packages were installed, but do not start here ({last}). The log has the rest; "
                      "start again with --repair.")
    return compiler


def _choice(args: argparse.Namespace, app: Path) -> gpu.Choice:
    """Asked once and remembered: nvidia-smi can take seconds. --repair or another driver asks again."""
    if args.cpu:
        return gpu.choose(force_cpu=True)
    memory, mark = app / "card.json", gpu.fingerprint()
    try:
        document = json.loads(memory.read_text(encoding="utf-8"))
        if document["mark"] == mark and not args.repair:
            return gpu.Choice(document["backend"], document["sentence"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    choice = gpu.choose()
    document = {"mark": mark, "backend": choice.backend, "sentence": choice.sentence}
    memory.write_text(json.dumps(document), encoding="utf-8")
    return choice


def _go_back(app: Path, trouble: Trouble, screen: Screen) -> environment.Environment:
    old = environment.previous(app)
    if old is None:
        raise trouble
    screen.say(f"{trouble}\nStarting with the parts of the previous installation instead.")
    return old


def _self_check(where: environment.Environment, app: Path, screen: Screen) -> None:
    """Every kernel on the device that will be used. What it finds is said; it never keeps the page from starting."""
    done = _run_inside(where, app, "-m", "kernels")
    screen.log(done.stdout)
    lines = done.stdout.strip().splitlines() or ["no answer"]
    screen.say(lines[-1] if done.returncode == 0 else
               f"The self-check failed ({lines[-1]}). If answers fail too, start with --cpu.")


def _run_inside(where: environment.Environment, app: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the environment's Python on the program's own modules; what it prints is kept."""
    return subprocess.run([where.python, *arguments], cwd=ROOT, env=where.variables(app / "cache"), text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
