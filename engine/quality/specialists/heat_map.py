"""The use of a model's experts as a picture: a row for each layer, a field for each expert."""
from __future__ import annotations

from engine.policies.usage import Usage
from engine.quality.evidence.svg import COLOURS, EDGE, WIDTH, drawing, words


def heat_map(usage: Usage) -> str:
    """SVG: the darker, the more often taken; a field without colour never was. Its title says how often."""
    layers, experts = usage.hard.shape
    width, height = (WIDTH - 2 * EDGE) / experts, max(4.0, min(16.0, 320 / layers))
    drawn = [words(EDGE, 16, f"{usage.tokens:,} tokens, {experts} experts a layer; by how often each was taken")]
    for layer, row in enumerate(usage.hard.tolist()):
        y, most = 28 + layer * height, max(row)
        if height >= 11 or layer % 4 == 0:
            drawn.append(words(EDGE - 6, y + min(height, 11), str(layer), "end"))
        drawn += [f'<rect x="{EDGE + expert * width:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
                  f'fill="{COLOURS[0]}" fill-opacity="{n / most:.3f}"><title>layer {layer}, expert {expert}: {n:,}'
                  "</title></rect>" for expert, n in enumerate(row) if n]
    return drawing(drawn, 28 + layers * height + 12)
