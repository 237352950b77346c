"""Model text to HTML: safe, and the same whether it grew in pieces or came at once."""
from __future__ import annotations

import random
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from app import formulas, markdown
from app.markdown import Growing, render
from tests.browser.formulas import FORMULAS

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
        assert name != "href" or value.startswith(("http://", "https://", "mailto:"))


@pytest.mark.parametrize("address", ["ftp://a/b", "tel:1", "/api/export", "api/export", "#top", "file:///etc/passwd",
                                     "//evil.example", "JavaScript:alert(1)", "data:image/png;base64,AAAA",
                                     "vbscript:x", "blob:http://a", "java&#x0A;script:alert(1)", "smb://a/b", "?t=x",
                                     "ms-word:x"])
@pytest.mark.parametrize("form", ["[x]({0})", "![x]({0})", "<{0}>", "[x]\n\n[x]: {0}", "[x](<{0}>)"])
def test_links_lead_to_the_web_or_to_mail_only(form, address):
    assert "href" not in render(form.format(address)) and "src" not in render(form.format(address))


def test_links_to_the_web_and_to_mail_are_links():
    for address in ("http://a/b", "https://a/b?c=d", "HTTPS://a", "mailto:a@b.example"):
        assert f'href="{address}"' in render(f"[x]({address})") and "href" in render(f"<{address}>")


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


# Each is the repeated part of a text that used to be rendered whole at every update: a block of code, a table, lists, a
# long line, and what some of the rules take the square (or, for Java, the cube) of their characters for.
GROWING = {"code": ("```python\n", "def f(x):\n    return x\n\n"), "java": ("```java\n", "public static a b c\n"),
           "one line of code": ("```java\n", "public static a b c "), "no language": ("```\n", "word\n"),
           "table": ("|a|b|\n|-|-|\n", "| *a* | b |\n"), "list": ("", "* item **one**\n"),
           "loose list": ("", "1. item\n\n   more\n\n"), "quote": ("", "> word *word*\n>\n"),
           "long line": ("", "word *word* "), "lines": ("", "word *word*\n"), "brackets": ("", "!["),
           "math": ("$$\n", "\\frac{1}{2}\n"), "maths": ("", "$a^2$ and "), "paragraphs": ("", "word *word*\n\n")}


@pytest.mark.parametrize("kind", GROWING)
def test_what_grows_is_rendered_piece_by_piece(kind, monkeypatch):
    """At most one piece anew for an update, whatever has been written before."""
    counted = []

    def counting(function):
        def call(text, *rest):
            counted.append(len(text))
            return function(text, *rest)
        return call
    monkeypatch.setattr(markdown, "highlight", counting(markdown.highlight))
    monkeypatch.setattr(markdown._INLINE, "renderInline", counting(markdown._INLINE.renderInline))
    monkeypatch.setattr(formulas, "convert_to_element", counting(formulas.convert_to_element))
    monkeypatch.setattr(markdown, "SECONDS", 1e9)
    markdown._inline.cache_clear()
    markdown._coloured.cache_clear()
    beginning, part = GROWING[kind]
    text, growing, updates = (beginning + part * 20_000)[:20_000], Growing(), range(400, 20_001, 400)
    for length in updates:
        growing.update(text[:length])
    assert sum(counted) <= 2 * len(text) + len(updates) * 2500
    assert max(counted, default=0) <= 5000
    assert "".join(growing.blocks) == render(text)


def test_only_languages_whose_colours_are_known_to_be_cheap_are_coloured():
    """`autohotkey` takes seconds for 2,000 spaces, in which no other thread runs."""
    for language in markdown.LANGUAGES:
        html = render(f"```{language.upper()}\n# 'a' 1 = \"b\" {{ c }} -- d\n+ new\n> a = 1\n<b>\n```")
        assert "<span" in html.split("<code>")[1], language
    for language in ("autohotkey", "gherkin", "autoit", "no-such-language", "python\x00", "text"):
        assert "<span" not in render(f"```{language}\n" + "  \n" * 5000 + "a = 'b'\n```").split("<code>")[1]


def test_no_time_left_means_plain_text(monkeypatch):
    monkeypatch.setattr(markdown, "SECONDS", 0.0)
    html = render("**a** <b>\nc\n\n```python\ndef f(): pass\n```\n\n* *d*\n")
    assert "**a** &lt;b&gt;<br>\nc" in html and "def f(): pass" in html and "<li>*d*</li>" in html


def test_beyond_the_limits_text_stays_as_it_was_written():
    assert "<strong>" in render("**a** " * 800) and "<strong>" not in render("**a** " * 900)
    long = "word\n\n" * 40_000
    html = render(long + "**<b>**")
    assert html.endswith("<br>\n<br>\n**&lt;b&gt;**</p>") and html.count("word") == 40_000


@pytest.mark.parametrize("language", ["python", "java", "yaml", "html", "", "no-such-language"])
def test_code_is_shown_to_the_last_character(language):
    code = Path(markdown.__file__).read_text() * 3 + "\n\n  \n"
    for length in (1, 100, 1999, 2000, 2001, len(code)):
        html = render(f"```{language}\n{code[:length]}\n```")
        shown = re.search("<code>(.*)</code>", html, re.DOTALL)[1]
        assert unescape(re.sub("<[^>]*>", "", shown)) == code[:length] + "\n"


DISPLAYS = ["\\[\n+ a - b\n- c + d\n\\]", "\\begin{align*} a &= b \\\\ c &= d \\end{align*}",
            "\\begin{equation}\n- x\n\\end{equation}", "words\n\\[\n- x\n\\]\nwords"]


@pytest.mark.parametrize("text", DISPLAYS)
def test_a_formula_over_several_lines_is_no_list(text):
    html = render(text)
    assert html.count('<math display="block">') == 1 and "<li>" not in html and "begin" not in html and "[" not in html


@pytest.mark.parametrize("text", [*DISPLAYS, "\\[ open\n\n- list", "\\[ x \\] and more", "\\begin{align} a\n\nb"])
def test_a_formula_that_grows_ends_as_the_whole_text(text):
    growing = Growing()
    for end in range(1, len(text) + 1):
        growing.update(text[:end])
    assert "".join(growing.blocks) == render(text)


@pytest.mark.parametrize("text, there, not_there", [
    ("$HOME/$USER and $x$", "$HOME/$USER", "<mi>H"), ("it costs $5 or $6", "$5 or $6", "<math"),
    ("$a$.", "<mi>a</mi>", "$"),
    ("- [ ] milk\n- [x] bread\n- [y](http://a.b)", "<li>☐ milk</li>\n<li>☑ bread</li>", "[x]"),
    ("a [ ] b", "a [ ] b", "☐"), ("x<br>y<BR/>z", "x<br />\ny<br />\nz", "&lt;"), ("`<br>`", "&lt;br&gt;", "<br"),
    ("这是**粗体**，好", "<strong>粗体</strong>，", "*"), ("他说**“好”**的", "<strong>“好”</strong>的", "*"),
    ("これは**「太字」**です", "<strong>「太字」</strong>", "*"), ("2 * 3 * 4", "2 * 3 * 4", "<em>"),
    ("中 ** 文 ** 中", "**", "<strong>"),
    ("<b>bold</b>", "&lt;b&gt;", "<b>"), ("a\\<br>", "&lt;br&gt;", "<br"), ("    \\[ x \\]", "\\[ x \\]", "<math")])
def test_what_a_reader_expects_of_small_marks(text, there, not_there):
    html = render(text)
    assert there in html and not_there not in html


@pytest.mark.parametrize("text, address, rest", [
    ("See https://a.example/b.", "https://a.example/b", "."),
    ("(http://a.example/x_(y))", "http://a.example/x_(y)", ")"),
    ("http://a.example?q=1&r=2, or", "http://a.example?q=1&amp;r=2", ", or"),
    ("见 https://a.example/b。", "https://a.example/b", "。"),
    ("**https://a.example**", "https://a.example", "</strong>")])
def test_a_bare_address_is_a_link(text, address, rest):
    html = render(text)
    assert f'<a href="{address}" target="_blank" rel="noopener noreferrer">{address}</a>{rest}' in html


NO_ADDRESS = ["xhttp://a.example", "http:// a", "blob:http://a", "`https://a.example`",
              "ftp://a.example", "https:", "javascript://a"]


@pytest.mark.parametrize("text", NO_ADDRESS)
def test_what_is_no_address_is_no_link(text):
    assert "<a " not in render(text)


def test_a_link_holds_no_other():
    assert render("[https://a.example](https://b.example)").count("<a ") == 1


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_become_mathml_whole(text):
    html = render(f"$$\n{text}\n$$")
    assert html.count('<math display="block">') == 1
    assert "begin" not in html and "<mi>&amp;</mi>" not in html and "<mo>&amp;</mo>" not in html


@pytest.mark.parametrize("text", [r"\lim_{x \to 0} f", r"\max_x f", r"\inf_{x} f", r"\limsup_n a", r"\bigcup_i A",
                                  r"\operatorname*{argmax}_x f", r"\mathop{\mathrm{argmin}}_x f", r"\sum_i a",
                                  r"\prod_i a"])
def test_limits_stand_below_in_a_display_and_at_the_side_in_a_line(text):
    assert "<munder>" in render(f"$$\n{text}\n$$") and "<munder>" not in render(f"A ${text}$ here")


def test_limits_stay_where_they_are_asked_for():
    assert "<munder>" not in render("$$\n\\bigcup\\nolimits_i A + \\int_0 f\n$$")


@pytest.mark.parametrize("chemistry, elements", [
    ("H2O", ["<msub><mtext>H</mtext><mrow><mn>2</mn>", "<mtext>O</mtext>"]),
    ("2H2 + O2 -> 2H2O", ["<mn>2</mn><msub><mtext>H", "<mo>+</mo>", "<mo>→</mo><mn>2</mn>"]),
    ("SO4^2-", ["<msubsup>", "<mn>4</mn>", "<mn>2</mn><mo>−</mo>"]),
    ("Na+ + Cl-", ["<msup>", "<mo>+</mo>", "<mo>−</mo>"]),
    ("NaCl(s) <=> NaCl(aq)", ["<mtext>(s)</mtext>", "<mo>⇌</mo>", "<mtext>(aq)</mtext>"]),
    ("CuSO4.5H2O", ["<mo>·</mo><mn>5</mn>"]), ("A ->[heat] B", ["<mtext>heat</mtext>"]),
    ("CH2=CH2", ["<mo>=</mo>"]), ("^{14}_{6}C", ["<mn>14</mn>", "<mn>6</mn>"])])
def test_chemistry_is_read(chemistry, elements):
    html = render(f"$\\ce{{{chemistry}}}$")
    assert all(element in html for element in elements) and "<code>" not in html, html


@pytest.mark.parametrize("text", [r"\ce{Fe^{II}}", r"\ce{A?}", r"\unheardof x", r"\pu{1 m}"])
def test_what_cannot_be_read_is_shown_as_it_was_written(text):
    assert f"<code>{text}</code>" in render(f"${text}$") and "<math" not in render(f"$$\n{text}\n$$")


def test_a_single_upright_letter_is_upright():
    assert "<mtext>d</mtext>" in render(r"$\mathrm{d}x$")


def test_rows_and_columns_of_an_aligned_formula_are_kept():
    html = render("$$\n\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}\n$$")
    assert html.count("<mtr>") == 2 and html.count("<mtd") == 4
