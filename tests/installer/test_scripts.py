"""The thin scripts around bootstrap.py: finding a Python, the batch file under wine, shortcuts, icons, the zips."""
from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from engine import data_dir
from installer import pack, places

ROOT = Path(__file__).resolve().parents[2]
INSTALLER = ROOT / "installer"
CLICKED = Path("installer", "double_click")  # where the files that are double-clicked lie in the source
BAT = ROOT / CLICKED / "Start Floe Chat.bat"
SCRIPTS = [*INSTALLER.rglob("*.sh"), *INSTALLER.rglob("*.command"), ROOT / ".ci" / "run"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the launcher in a folder with blanks and letters beyond ASCII."""
    copy = tmp_path / "Flöe é Chat"
    shutil.copytree(INSTALLER, copy / "installer", ignore=shutil.ignore_patterns("__pycache__", "bin"))
    return copy


def needs(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}")


def test_shellcheck():
    needs("shellcheck")
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_can_be_run():
    for script in SCRIPTS:
        assert os.access(script, os.X_OK), f"{script} is not executable"


def test_the_batch_file_is_what_cmd_can_read():
    text = BAT.read_bytes()
    assert text.isascii() and text.count(b"\n") == text.count(b"\r\n")
    assert b"||" not in text, "cmd's || depends on which command failed how"
    for line in text.splitlines():  # a batch file that is run without `call` never comes back
        assert not line.split()[:1] or not line.split()[0].lower().endswith(b".bat")


def python_of(folder: Path, path: str) -> subprocess.CompletedProcess:
    return subprocess.run(["/bin/sh", folder / "installer" / "python.sh"], capture_output=True, text=True,
                          env={"PATH": path, "HOME": str(folder)})


@pytest.fixture
def bare_path(tmp_path) -> str:
    """A PATH with the ordinary tools and without any Python."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "cat", "cut", "dirname", "grep", "sha256sum", "sleep", "rm"):
        (tools / tool).symlink_to(shutil.which(tool))
    return str(tools)


def test_without_any_python_there_is_a_sentence(folder, bare_path):
    done = python_of(folder, bare_path)
    assert done.returncode == 3 and "python3-venv" in done.stderr
    done = subprocess.run(["/bin/sh", folder / "installer" / "start.sh"], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env={"PATH": bare_path})
    assert done.returncode == 3 and done.stdout == ""


def test_an_old_python_is_passed_over(folder, bare_path):
    old, new = Path(bare_path, "python3"), Path(bare_path, "python3.12")
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    new.symlink_to(sys.executable)
    assert python_of(folder, bare_path).stdout == f"{new}\n"


def test_the_python_of_last_time_is_taken_first(folder, bare_path):
    (folder / ".app").mkdir()
    (folder / ".app" / "python-path").write_text(f"{sys.executable}\n")
    assert python_of(folder, bare_path).stdout == f"{sys.executable}\n"
    (folder / ".app" / "python-path").write_text("/gone/python\n")
    assert python_of(folder, bare_path).returncode == 3


@pytest.mark.skipif(sys.platform == "win32", reason="the window is a pseudo-terminal")
@pytest.mark.parametrize("python", ["there", "missing"])
def test_the_window_stays_open_until_a_key_is_pressed(folder, bare_path, python):
    """In a terminal, as a double click gives one: the sentence, the log's name, and nothing vanishes unread."""
    import pty
    window, inside = pty.openpty()
    path = os.environ["PATH"] if python == "there" else bare_path
    process = subprocess.Popen(["/bin/sh", folder / "installer" / "start.sh", "--cpu", "--offline"], stdin=inside,
                               stdout=inside, stderr=inside, env=os.environ | {"PATH": path, "HOME": str(folder)})
    os.close(inside)
    said = b""
    while b"Press Enter to close this window." not in said:
        said += os.read(window, 4096)
    assert process.poll() is None
    os.write(window, b"\n")
    assert process.wait(60) == 3
    os.close(window)
    if python == "there":
        assert b"--offline forbids downloads" in said and str(folder / ".app/logs/launcher.log").encode() in said
    else:
        assert b"sudo apt install python3 python3-venv" in said


def fake_uv(path: Path, record: Path) -> str:
    """A uv that notes how it is called and has this Python to offer; its checksum."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "$UV_PYTHON_INSTALL_DIR: $*" >> "{record}"\n'
                    f'if [ "$2" = find ]; then echo "{sys.executable}"; fi\n')
    path.chmod(0o755)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("beside", [True, False])
def test_a_uv_with_the_right_checksum_fetches_python(folder, bare_path, tmp_path, beside):
    uv = folder / "installer" / "bin" / "uv" if beside else Path(bare_path, "uv")
    checksum = fake_uv(uv, tmp_path / "record")
    done = python_of(folder, bare_path)
    assert done.returncode == 3 and "left alone" in done.stderr and not (tmp_path / "record").exists()
    (folder / "installer" / "pins" / "uv.sha256").write_text(f"{checksum}  linux-x64\n")
    assert python_of(folder, bare_path).stdout == f"{sys.executable}\n"
    calls = (tmp_path / "record").read_text().splitlines()
    assert calls == [f"{folder}/.app/python: python install --no-bin --quiet 3.12",
                     f"{folder}/.app/python: python find --managed-python 3.12"]


def test_the_desktop_file_is_valid(folder, tmp_path):
    needs("desktop-file-validate")
    subprocess.run(["sh", folder / "installer/menus/install_shortcut.sh"], check=True, capture_output=True,
                   env=os.environ | {"XDG_DATA_HOME": str(tmp_path / "share")})
    entry = tmp_path / "share" / "applications" / "floechat.desktop"
    done = subprocess.run(["desktop-file-validate", entry], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout
    assert f'Exec=sh "{folder}/installer/start.sh"' in entry.read_text(encoding="utf-8").splitlines()
    subprocess.run(["sh", folder / "installer/menus/install_shortcut.sh", "--remove"], check=True,
                   env=os.environ | {"XDG_DATA_HOME": str(tmp_path / "share")})
    assert not entry.exists()


def test_a_double_click_finds_odd_folders(tmp_path):
    """The four characters that a desktop file quotes, and the percent sign, by a real launch."""
    needs("gtk-launch")
    odd = tmp_path / 'a $HOME `b` "c" 100% é'
    shutil.copytree(INSTALLER, odd / "installer", ignore=shutil.ignore_patterns("__pycache__"))
    (odd / "installer" / "start.sh").write_text(f'#!/bin/sh\necho "$0" > "{tmp_path}/clicked"\n')
    variables = os.environ | {"XDG_DATA_HOME": str(tmp_path / "share"), "HOME": str(tmp_path)}
    subprocess.run(["sh", odd / "installer/menus/install_shortcut.sh"], check=True, capture_output=True,
                   env=variables)
    entry = tmp_path / "share" / "applications" / "floechat.desktop"
    entry.write_text(entry.read_text(encoding="utf-8").replace("Terminal=true", "Terminal=false"), encoding="utf-8")
    gtk_launch("floechat", variables, tmp_path / "clicked")
    assert (tmp_path / "clicked").read_text(encoding="utf-8") == f"{odd}/installer/start.sh\n"


def gtk_launch(name: str, variables: dict[str, str], sign: Path) -> None:
    """A double click, as GTK's own tool does it; it needs a screen, so one is made, until there is the file `sign`."""
    needs("xvfb-run")
    wait = f'n=0; until [ -s "{sign}" ] || [ $n -ge 1200 ]; do sleep 0.1; n=$((n + 1)); done'
    done = subprocess.run(["xvfb-run", "-a", "sh", "-c", f"gtk-launch {name} && {wait}"], capture_output=True,
                          text=True, env=variables, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_data_folder_is_the_engine_s(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLOECHAT_HOME", raising=False)
    assert places.data_folder(None) == data_dir()
    chosen = places.data_folder(str(tmp_path / "my models é"))
    assert places.data_folder(None) == chosen == tmp_path / "my models é"
    monkeypatch.setenv("FLOECHAT_HOME", str(tmp_path / "else"))
    assert places.data_folder(None) == data_dir() == tmp_path / "else"


def test_icons_are_made_from_one_drawing():
    icons = ROOT / "assets" / "icons"
    assert Image.open(icons / "floechat.png").size == (256, 256)
    assert {(16, 16), (48, 48), (256, 256)} <= Image.open(icons / "floechat.ico").info["sizes"]
    assert Image.open(icons / "floechat.icns").size[0] >= 512
    for name in ("png", "ico", "icns"):
        middle = Image.open(icons / f"floechat.{name}").convert("RGBA").resize((64, 64)).getpixel((24, 26))
        assert middle[3] == 255 and middle[2] > 60, f"floechat.{name} is not the drawing"


@pytest.mark.parametrize("platform", pack.PLATFORMS)
def test_zips_are_the_same_every_time(tmp_path, platform):
    """But for uv, which `test_release_zips` adds."""
    for name in ("one.zip", "two.zip"):
        pack.write_zip(tmp_path / name, pack.contents(platform))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        names = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    assert names["Floe Chat/installer/start.sh"] & 0o111 and not names["Floe Chat/README.md"] & 0o111
    assert ("Floe Chat/Start Floe Chat.bat" in names) == (platform == "win-x64")
    assert ("Floe Chat/Start Floe Chat.command" in names) == (platform == "macos-arm64")
    assert not any(".app/" in name or "__pycache__" in name or "/tests/" in name for name in names)


@pytest.mark.slow
def test_release_zips(tmp_path):
    done = subprocess.run([sys.executable, INSTALLER / "pack.py", "--dest", tmp_path], capture_output=True, text=True)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("the package index has no uv of the pinned version")
    assert done.returncode == 0, done.stderr
    paths = sorted(tmp_path.glob("*.zip"))
    assert [path.stem.split("-", 2)[2] for path in paths] == sorted(pack.PLATFORMS)
    assert all(path.stat().st_size <= pack.MAX_BYTES for path in paths)
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in paths]
    assert sorted((tmp_path / "SHA256SUMS").read_text().splitlines(), key=lambda line: line[66:]) == sums
    shutil.unpack_archive(next(path for path in paths if "linux" in path.name), tmp_path / "there")
    uv = tmp_path / "there" / "Floe Chat" / "installer" / "bin" / "uv"
    uv.chmod(0o755)
    assert subprocess.run([uv, "--version"], capture_output=True, text=True).stdout.startswith("uv ")


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    """cmd of wine with a Windows folder of its own: run(folder, *arguments) -> (exit code, output)."""
    needs("wine")
    prefix = tmp_path_factory.mktemp("wine")
    variables = os.environ | {"WINEPREFIX": str(prefix), "WINEDEBUG": "-all", "WINEDLLOVERRIDES": "mscoree,mshtml="}
    variables.pop("DISPLAY", None)

    def run(folder: Path, *arguments: str) -> tuple[int, str]:
        done = subprocess.run(["wine", "cmd", "/c", BAT.name, *arguments], cwd=folder, env=variables,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
        return done.returncode, done.stdout.decode("cp437", errors="replace")
    yield run
    subprocess.run(["wineserver", "-k"], env=variables, capture_output=True)


@pytest.mark.slow
def test_the_batch_file_alone_asks_for_the_whole_zip(wine, tmp_path):
    shutil.copy(BAT, tmp_path)
    code, said = wine(tmp_path)
    assert code == 3 and "Extract the whole zip first" in said


@pytest.mark.slow
def test_the_batch_file_without_python(wine, folder):
    code, said = wine(folder / CLICKED)
    assert code == 3 and "needs Python" in said


# Writes its command line and ends with code 7, on nothing but kernel32: compiling the C library would take minutes.
SHOW = """
char *GetCommandLineA(void);
void *GetStdHandle(unsigned);
int lstrlenA(char *), WriteFile(void *, char *, unsigned, unsigned *, void *);
void ExitProcess(unsigned);
void start(void) {
    unsigned n;
    WriteFile(GetStdHandle(-11), GetCommandLineA(), lstrlenA(GetCommandLineA()), &n, 0);
    ExitProcess(7);
}
"""


# Stands for certutil, for findstr (ends with FOUND) and for uv (names PYTHON when asked to find one); wine's own
# certutil and findstr do nothing. cmd looks for programs in the current folder first.
TOOLS = """
char *GetCommandLineA(void);
void *GetStdHandle(unsigned);
int lstrlenA(char *), WriteFile(void *, char *, unsigned, unsigned *, void *);
void ExitProcess(unsigned);
static int has(char *text, char *word) {
    for (; *text; text++) {
        char *a = text, *b = word;
        while (*b && *a == *b) a++, b++;
        if (!*b) return 1;
    }
    return 0;
}
void start(void) {
    unsigned n;
    char *line = GetCommandLineA();
    if (has(line, "python find")) WriteFile(GetStdHandle(-11), PYTHON, lstrlenA(PYTHON), &n, 0);
    ExitProcess(has(line, "/g:") ? FOUND : 0);
}
"""


def compiled(folder: Path, name: str, code: str, **constants: str) -> Path:
    """A Windows program. HOME is the folder, so that zig's cache lies there."""
    pytest.importorskip("ziglang", reason="needs the ziglang wheel to compile a Windows program")
    folder.mkdir(exist_ok=True)
    source = folder / f"{name}.c"
    source.write_text(code)
    defined = [f"-D{key}={value}" for key, value in constants.items()]
    subprocess.run([sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-windows-gnu", "-nostdlib", "-O1",
                    "-fno-sanitize=undefined", *defined, source, "-o", source.with_suffix(".exe"), "-lkernel32",
                    "-Wl,-e,start"], check=True,
                   env=os.environ | {"HOME": str(folder)})
    return source.with_suffix(".exe")


def as_windows(path: Path) -> str:
    return "Z:" + str(path).replace("/", "\\")


@pytest.mark.slow
@pytest.mark.parametrize("found", [0, 1])
def test_the_batch_file_takes_the_uv_of_the_list_and_no_other(wine, folder, tmp_path, found):
    show = compiled(tmp_path / "show", "show", SHOW)
    python = '"' + as_windows(show).replace("\\", "\\\\") + '\\r\\n"'
    tools = compiled(tmp_path / "tools", "tools", TOOLS, PYTHON=python, FOUND=str(found))
    (folder / "installer" / "bin").mkdir()
    for place in (CLICKED / "certutil.exe", CLICKED / "findstr.exe", Path("installer", "bin", "uv.exe")):
        shutil.copy(tools, folder / place)
    code, said = wine(folder / CLICKED, "--cpu")
    if found == 0:
        assert code == 7 and re.search(r'show.exe" -I "Z:.*\\installer\\bootstrap.py" --cpu', said), said
    else:
        assert code == 3 and "uv.exe is not the one this release was made with" in said and "bootstrap" not in said


@pytest.mark.slow
@pytest.mark.parametrize("on_top", [True, False])
def test_the_batch_file_hands_over(wine, folder, tmp_path, on_top):
    """The Python of last time is a small program of ours, compiled for Windows, that shows what it is given."""
    (folder / ".app").mkdir()
    (folder / ".app" / "python-path").write_text(as_windows(compiled(tmp_path / "show", "show", SHOW)) + "\n")
    if on_top:
        shutil.move(folder / CLICKED / BAT.name, folder / BAT.name)
    code, said = wine(folder if on_top else folder / CLICKED, "--port", "7999")
    assert code == 7, said
    assert re.search(r'show.exe" -I "Z:.*\\installer\\bootstrap.py" --port 7999', said)
