"""Model text to HTML: safe, and the same whether it grew in pieces or came at once."""
from __future__ import annotations

import random
from html.parser import HTMLParser

import pytest

from app.markdown import Growing, render

SAMPLE = """# Title

Some **bold** text, `code` and $a^2$ math, \\(b\\) too.
Second line.

* one
* two

    * nested

1. first

   with a paragraph
2. second

```python
def f(x):

    return "a" * x
```

| a | b |
|---|---|
| 1 | 2 |

$$
\\frac{1}{2}
$$

> quote
> goes on

Last words.
"""


EVIL = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "`<script>`",
        "![x](javascript:alert(1))", "<svg/onload=alert(1)>", "$<img src=x onerror=alert(1)>$", "```<b>\n<script>\n```",
        "[x](data:text/html,<script>)", "$$\\text{<b onclick=alert(1)>}$$", "$\\href{javascript:alert(1)}{x}$",
        '[x](http://a/" onclick="alert(1))', "$\\style{color:red}{x}$", "$\\color{red\" onclick=\"x}{x}$",
        "\\(\\mathrm{</math><script>}\\)"]


class Finder(HTMLParser):
    """Collects what a browser would see: elements and attributes."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes


@pytest.mark.parametrize("text", EVIL)
def test_nothing_that_runs_comes_out(text):
    finder = Finder()
    finder.feed(render(text))
    assert not finder.tags & {"script", "img", "svg", "b", "style", "iframe"}
    for name, value in finder.attributes:
        assert not name.startswith("on") and name != "style"
        assert name != "href" or value.startswith(("http://", "https://"))


def test_images_become_links_so_that_nothing_is_fetched():
    assert 'href="http://x/y.png"' in render("![a cat](http://x/y.png)")


def test_math_code_and_tables_are_rendered():
    html = render(SAMPLE)
    assert html.count("<math") == 3 and "<mfrac>" in html and "<table>" in html
    assert 'class="copy-code"' in html and '<span class="k">def</span>' in html
    assert "<code>" in render("$\\frac{$") or "<math" in render("$\\frac{$")
    assert "<math" not in render("It costs $5 and $6.")


@pytest.mark.parametrize("seed", range(5))
def test_growing_ends_as_the_whole_and_says_truly_what_changed(seed):
    chance, growing, page, text = random.Random(seed), Growing(), [], ""
    while text != SAMPLE:
        text = SAMPLE[:len(text) + chance.randint(1, 40)]
        first = growing.update(text)
        page[first:] = growing.blocks[first:]
        assert page == growing.blocks
    assert "".join(page) == render(SAMPLE)
    assert growing.update(SAMPLE) > 3  # most blocks were kept
