"""What `sh installer/check.sh` does once there is a Python: the test environment, the system's packages, ruff, pytest.

Ends with pytest's own closing lines and exit code. Tests whose tools are missing skip themselves and say so; this
file only tries to get the tools, and says why where it may not.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from installer import environment, gpu  # noqa: E402
from installer.screen import Screen, Trouble  # noqa: E402

# A command or a file below / that shows that the package is there; Debian's name of the package.
SYSTEM = (("chromium", "chromium"), ("usr/share/fonts/truetype/dejavu", "fonts-dejavu-core"), ("Xvfb", "xvfb"),
          ("xterm", "xterm"), ("gtk-launch", "libgtk-3-bin"), ("desktop-file-validate", "desktop-file-utils"),
          ("shellcheck", "shellcheck"), ("wine", "wine"), ("usr/lib/wine/wine64", "wine64"))
MOST_PROCESSES = 4  # at once; a file's tests share models and browsers, so a file stays in one of them


def main(arguments: list[str]) -> int:
    app = ROOT / ".app"
    (app / "logs").mkdir(parents=True, exist_ok=True)
    screen = Screen(app / "logs" / "check.log")
    quick = "--quick" in arguments
    try:
        where = test_environment(app, screen)
    except Trouble as trouble:
        return screen.fail(trouble)
    system_packages(screen)
    rest = [argument for argument in arguments if argument != "--quick"]
    # Each of the processes below has one core; what numba compiles for this processor they compile once.
    cache = app / "cache"
    variables = where.variables(cache) | {"OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(cache / "numba")}
    linted = subprocess.run([where.python, "-m", "ruff", "check", "."], cwd=ROOT, env=variables).returncode
    cores = max(1, min(MOST_PROCESSES, os.cpu_count() or 1))
    pytest = [where.python, "-m", "pytest", "-ra", "-n", str(cores), "--dist", "loadfile",
              "--hypothesis-profile", "ci",  # the same examples every time
              "--no-loadscope-reorder",  # in the order of tests/conftest.py, not by how many tests a file has
              *(["-m", "not slow"] if quick else []), *rest]
    return subprocess.run(pytest, cwd=ROOT, env=variables).returncode or linted


def test_environment(app: Path, screen: Screen) -> environment.Environment:
    """The environment with everything the tests import, on the build of torch that this computer can use."""
    choice = gpu.choose()
    screen.say(choice.sentence)
    pins = ROOT / "installer" / "pins"
    locks = (pins / "tests.lock", pins / "compiler.lock")
    recipe = environment.Recipe("tests", environment.torch_pins(pins, choice.backend), locks)
    return environment.ready(app, recipe) or environment.build(app, recipe, screen)


def system_packages(screen: Screen) -> None:
    """Browser, fonts and the rest from the system's packages, where this process may install them."""
    missing = [package for sign, package in SYSTEM if shutil.which(sign) is None and not Path("/", sign).exists()]
    if not missing:
        return
    if shutil.which("apt-get") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        screen.say(f"Not installed: {' '.join(missing)}. Only root on a Debian-like system may add them, so the tests "
                   "that need them will be skipped.")
        return
    screen.say(f"Installing for the tests: {' '.join(missing)} ...")
    apt(screen, "-o", "APT::Update::Error-Mode=any", "update")
    for package in missing:
        if not apt(screen, "install", "-y", "--no-install-recommends", package):
            screen.say(f"{package} could not be installed (the reason is in {screen.log_path}); the tests that need it "
                       "will be skipped.")


def apt(screen: Screen, *words: str) -> bool:
    """apt-get, again after a pause where it fails for a reason that may pass: the network, or another apt at work."""
    command = ["apt-get", "-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=120", *words]
    for pause in (*environment.PAUSES, None):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"})
        if done.returncode == 0:
            return True
        screen.log(f"$ {' '.join(command)}\n{done.stderr}")
        if pause is None or re.search("Unable to locate package|has no installation candidate", done.stderr):
            return False
        time.sleep(pause)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
