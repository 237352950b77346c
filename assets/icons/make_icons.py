"""For developers: makes the png, ico and icns from floechat.svg; Chromium draws, Pillow packs."""
from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
SIDE = 1024  # pixels of the drawing that everything is scaled down from
ICO_SIDES = (16, 24, 32, 48, 64, 128, 256)


def main() -> int:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("Chromium is needed to draw the icon.", file=sys.stderr)
        return 2
    drawing = draw(browser)
    drawing.resize((256, 256), Image.Resampling.LANCZOS).save(HERE / "floechat.png", optimize=True)
    drawing.save(HERE / "floechat.ico", sizes=[(side, side) for side in ICO_SIDES])
    drawing.resize((512, 512), Image.Resampling.LANCZOS).save(HERE / "floechat.icns")
    return 0


def draw(browser: str) -> Image.Image:
    """The drawing at SIDE pixels on a transparent ground."""
    svg = (HERE / "floechat.svg").read_text(encoding="utf-8").replace('width="512" height="512"', 'width="100%"')
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        page.write_text(f"<body style='margin:0'>{svg}</body>", encoding="utf-8")
        subprocess.run([browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1",
                        "--default-background-color=00000000", f"--window-size={SIDE},{SIDE}", f"--screenshot={shot}",
                        f"--user-data-dir={folder}/profile", page.as_uri()], check=True, capture_output=True)
        return Image.open(shot).convert("RGBA")


if __name__ == "__main__":
    sys.exit(main())
