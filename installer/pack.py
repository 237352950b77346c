"""For developers: builds the release zips and SHA256SUMS in dist/. The same input gives the same bytes.

A zip holds the packages, the assets, the launcher and, as installer/bin/uv, the one program that can fetch a Python
where there is none; it is taken from the wheel of the pinned version and must have the checksum in pins/uv.sha256.
"""
from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("LICENSE", "README.md", "pyproject.toml", "app", "assets", "engine", "installer", "kernels")
DEVELOPERS = {"installer/lock.sh", "installer/pack.py", "installer/check.sh", "installer/check.py",
              "installer/pins/tests.lock", "installer/pins/uv.lock", "assets/icons/make_icons.py"}
PLATFORMS = {"linux-x64": "manylinux_2_17_x86_64", "win-x64": "win_amd64", "macos-arm64": "macosx_11_0_arm64"}
# What is double-clicked stands at the top, and only where it works.
ON_TOP = {"installer/double_click/Start Floe Chat.bat": "win-x64",
          "installer/double_click/Start Floe Chat.command": "macos-arm64"}
MAX_BYTES = 80_000_000
MOMENT = (2020, 1, 1, 0, 0, 0)  # every file's date: the zip must not depend on when it was made


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Build the release zips.")
    parser.add_argument("--dest", type=Path, default=ROOT / "dist")
    parser.add_argument("--platform", choices=PLATFORMS, action="append", help="default: all")
    args = parser.parse_args(argv)
    args.dest.mkdir(parents=True, exist_ok=True)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    sums = []
    for platform in args.platform or PLATFORMS:
        path = args.dest / f"floechat-{version}-{platform}.zip"
        write_zip(path, contents(platform) | {f"installer/bin/{_uv_name(platform)}": uv(platform)})
        if path.stat().st_size > MAX_BYTES:
            print(f"{path.name} is larger than {MAX_BYTES / 1e6:.0f} MB.", file=sys.stderr)
            return 3
        sums.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    (args.dest / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    return 0


def contents(platform: str) -> dict[str, bytes]:
    """Path in the zip (below the top folder) -> bytes, of everything but uv."""
    files = {}
    for part in PARTS:
        path = ROOT / part
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            name = file.relative_to(ROOT).as_posix()
            if file.is_file() and "__pycache__" not in file.parts and name not in DEVELOPERS \
                    and not name.startswith("installer/bin/"):
                files[name] = file.read_bytes()
    for name, where in ON_TOP.items():
        double_clicked = files.pop(name)
        if platform == where:
            files[Path(name).name] = double_clicked
    return files


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    """Sorted, with fixed dates and rights, below one top folder."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"Floe Chat/{name}", MOMENT)
            entry.create_system = 3  # Unix, so that the rights below are heeded
            executable = name.endswith((".sh", ".command", "bin/uv"))
            entry.external_attr = (0o100755 if executable else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name], compresslevel=9)


def uv(platform: str) -> bytes:
    """The program, from its wheel; pip checks the wheel's hash, this the program's."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                        "--require-hashes", "--platform", PLATFORMS[platform], "--dest", folder,
                        "-r", str(ROOT / "installer" / "pins" / "uv.lock")], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(f".data/scripts/{_uv_name(platform)}")]
            program = archive.read(name)
    known = f"{hashlib.sha256(program).hexdigest()}  {platform}"
    assert known in (ROOT / "installer/pins/uv.sha256").read_text(encoding="utf-8").splitlines(), f"unknown uv: {known}"
    return program


def _uv_name(platform: str) -> str:
    return "uv.exe" if platform.startswith("win") else "uv"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
