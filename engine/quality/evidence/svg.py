"""Pictures as SVG, written by hand: a few words and shapes."""
from __future__ import annotations

from collections.abc import Iterable
from html import escape

WIDTH, HEIGHT, EDGE = 640, 320, 56
COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#b8860b", "#0099c6")


def words(x: float, y: float, text: str, anchor: str = "start", colour: str = "#777") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def drawing(drawn: Iterable[str], height: float) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif" '
            f'font-size="11">\n' + "\n".join(drawn) + "\n</svg>\n")
