"""Model text to safe HTML: Markdown, code with colours and a copy button, LaTeX as MathML.

Raw HTML is escaped and images become links, so a model can neither run a script nor make the browser call home.
`Growing` renders a text that is still being written: blocks that are complete are rendered once and kept, only the last
one is rendered again (rendering costs about 5 ms per 1000 characters, so whole answers 12 times a second would not do).
"""
from __future__ import annotations

import re
from html import escape, unescape
from xml.etree.ElementTree import Element, tostring

from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from app.strings import TEXT

_COLOURED_CHARS = 20_000  # longer code stays plain: colouring costs about 1 ms per 1000 characters
_MATH_TAG = re.compile(r"math|m[a-z]+")
_MATH_VALUE = re.compile(r"[\w .#%+-]*")
_MATH_ATTRIBUTES = {"display", "mathvariant", "stretchy", "linethickness", "accent", "columnalign", "rowspacing",
                    "fence", "columnspacing", "columnlines", "rowlines", "displaystyle", "scriptlevel", "movablelimits",
                    "width", "minsize", "maxsize", "mathcolor", "lspace", "rspace", "separator", "form"}


def render(text: str) -> str:
    """The whole text as HTML."""
    return _MARKDOWN.render(text)


class Growing:
    """HTML blocks of a growing text; `update` says from which block on they changed."""

    def __init__(self):
        self.blocks: list[str] = []
        self._kept = 0  # blocks that are complete
        self._start = 0  # where in the text the first incomplete block begins

    def update(self, text: str) -> int:
        """Take in the longer text; the index of the first block that may differ from before."""
        first = self._kept
        rest = text[self._start:]
        env: dict = {}
        groups = _top_level(_MARKDOWN.parse(rest, env))
        self.blocks[first:] = [_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, env) for tokens in groups]
        if len(groups) > 1 and groups[-1][0].map:
            lines = rest.splitlines(keepends=True)
            self._start += sum(len(line) for line in lines[:groups[-1][0].map[0]])
            self._kept += len(groups) - 1
        return first


def _top_level(tokens: list) -> list[list]:
    groups: list[list] = []
    for token in tokens:
        if token.level == 0 and token.nesting >= 0:
            groups.append([])
        groups[-1].append(token)
    return groups


def _math(text: str, options: dict) -> str:
    try:
        element = convert_to_element(text, display="block" if options.get("display_mode") else "inline")
        return tostring(_harmless(element), encoding="unicode")
    except Exception:  # any text may come out of a model; TeX that cannot be read is shown as it is
        return f"<code>{escape(text)}</code>"


def _harmless(root: Element) -> Element:
    """Only MathML's own elements and harmless attributes: \\text and \\href would let a model write anything."""
    for element in root.iter():
        if not _MATH_TAG.fullmatch(element.tag):
            raise ValueError(element.tag)
        element.attrib = {name: value for name, value in element.attrib.items()
                          if name in _MATH_ATTRIBUTES and _MATH_VALUE.fullmatch(value)}
        element.text = unescape(element.text) if element.text else element.text  # the converter writes &#x221A;
    return root


def _bracket_math(state, silent: bool) -> bool:
    r"""\( inline \) and \[ display \], the delimiters that many models prefer to dollars."""
    opening = state.src[state.pos:state.pos + 2]
    closing = {"\\(": "\\)", "\\[": "\\]"}.get(opening)
    end = state.src.find(closing, state.pos + 2) if closing else -1
    if end < 0 or not state.src[state.pos + 2:end].strip():
        return False
    if not silent:
        token = state.push("math_inline" if closing == "\\)" else "math_inline_double", "math", 0)
        token.content = state.src[state.pos + 2:end]
    state.pos = end + 2
    return True


def _fence(self, tokens, index, options, env) -> str:
    token = tokens[index]
    language = token.info.strip().split(" ")[0] if token.info else ""
    label = f'<span class="lang">{escape(language)}</span>'
    button = f'<button type="button" class="copy-code">{escape(TEXT["copy"])}</button>'
    code = _coloured(token.content, language)
    return (f'<div class="code"><div class="code-head">{label}{button}</div>'
            f'<pre tabindex="0"><code>{code}</code></pre></div>\n')


def _coloured(code: str, language: str) -> str:
    if not language or len(code) > _COLOURED_CHARS:
        return escape(code)
    try:
        return highlight(code, get_lexer_by_name(language), HtmlFormatter(nowrap=True))
    except ClassNotFound:
        return escape(code)


def _image(self, tokens, index, options, env) -> str:
    token = tokens[index]
    address, name = str(token.attrGet("src") or ""), token.content or "image"
    return f'<a href="{escape(address)}" target="_blank" rel="noopener noreferrer">{escape(name)}</a>'


def _link_open(self, tokens, index, options, env) -> str:
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer")
    return self.renderToken(tokens, index, options, env)


def _build() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    markdown.use(dollarmath_plugin, allow_labels=False, allow_space=False, allow_digits=False, double_inline=True,
                 renderer=_math)
    markdown.inline.ruler.before("escape", "bracket_math", _bracket_math)
    for name, rule in (("fence", _fence), ("image", _image), ("link_open", _link_open)):
        markdown.add_render_rule(name, rule)
    markdown.add_render_rule("code_block", _fence)
    return markdown


_MARKDOWN = _build()
