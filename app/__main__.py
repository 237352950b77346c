"""`python -m app`: start the page on this computer's own address, open the browser, load the model meanwhile.

Exit codes as everywhere: 0 ended by the user, 2 user error in one sentence, 3 the machine failed.
"""
from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from pathlib import Path

from app.http.start_link import StartLink
from app.strings import TEXT
from engine import (
    LEVELS,
    MachineError,
    Options,
    UserError,
    begin_process,
    data_dir,
    empty_trash,
    make_private,
    only_one,
    typed,
)

HOST = "127.0.0.1"  # another address only with --lan, which needs a password
EVERYWHERE = "0.0.0.0"
PORT = 7860


def main(argv: list[str] | None = None) -> int:
    try:
        return _serve(_parser().parse_args(argv))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except MachineError as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:  # the server has ended in order and raises it again
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="floechat", description="Chat with an expert-mixture model.")
    parser.add_argument("--port", type=int, help=f"default: {PORT}, or a free one if that is taken")
    parser.add_argument("--lan", action="store_true",
                        help="let other devices of this network in, by the password that is set in Settings")
    parser.add_argument("--no-browser", action="store_true", help="print the link instead of opening it")
    parser.add_argument("--data", type=typed, metavar="DIR",
                        help="data folder (default: FLOECHAT_HOME, else the platform's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when it works")
    parser.add_argument("--level", choices=LEVELS, help="default: what the plan chooses for this machine")
    parser.add_argument("--model", type=typed, metavar="FOLDER",
                        help="a model folder (default: the last one that was open, at first the demo)")
    return parser


def _serve(args: argparse.Namespace) -> int:
    listener = _listen(args.port, EVERYWHERE if args.lan else HOST)
    os.umask(0o077)  # what is written from here on is its owner's alone
    data = data_dir(args.data)
    with only_one(data / "floechat.lock", TEXT["data_taken"].format(folder=data)):
        make_private(data)
        threading.Thread(target=empty_trash, args=(data,), name="trash", daemon=True).start()
        return _serve_from(data, listener, args)


def _serve_from(data: Path, listener: socket.socket, args: argparse.Namespace) -> int:
    _keep_inside(data)
    from app.diagnostics import start_log
    from app.server import Parts, serve
    start_log(data)

    options = Options(args.level, device=args.device)
    parts = Parts.make(data, args.model and args.model.absolute(), options, plan_level=args.level is None)
    link = StartLink(data, not args.no_browser)
    try:
        lan = _lan(parts) if args.lan else None

        def announce(url: str) -> None:
            link.announce(url)
            if lan:
                port = listener.getsockname()[1]
                print(TEXT["lan_open"].format(addresses=" ".join(f"http://{name}:{port}" for name in lan.names)),
                      flush=True)
        serve(parts, listener, announce, link.entered, lan)
    finally:
        link.forget()
    return 0


def _lan(parts):
    """Who lets other devices in. UserError without a password."""
    from app.http.sign_in import PREFERENCE, SignIn, own_names
    if not parts.chats.preference(PREFERENCE, {}):
        raise UserError(TEXT["lan_no_password"])
    return SignIn(lambda: parts.chats.preference(PREFERENCE, {}), own_names())


def _listen(wished: int | None, host: str = HOST) -> socket.socket:
    """A bound socket: the wished port or a sentence; without a wish the usual port or any free one."""
    # With the protocol named asyncio turns Nagle's algorithm off: else each answer's body waits 40 ms behind its head.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, PORT if wished is None else wished))
    except (OSError, OverflowError) as error:
        if wished is not None:
            raise UserError(TEXT["port_taken"].format(port=wished)) from error
        listener.bind((host, 0))
    return listener


def _keep_inside(data: Path) -> None:
    """Gradio's temporary files and every other cache go below the data folder, and whoever asks for the data folder by
    itself (which Hub, which hosts are allowed) is told this one."""
    os.environ["FLOECHAT_HOME"] = str(data)
    os.environ["GRADIO_TEMP_DIR"] = str(data / "cache" / "gradio")
    os.environ.setdefault("HF_HOME", str(data / "cache" / "huggingface"))
    os.environ.setdefault("NUMBA_CACHE_DIR", str(data / "cache" / "numba"))     # what is compiled for this processor
    os.environ.setdefault("TRITON_CACHE_DIR", str(data / "cache" / "triton"))   # and for this card, by Triton's version
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


if __name__ == "__main__":
    begin_process("app")
    sys.exit(main())
