"""Model text to safe HTML: Markdown, code with colours and a copy button, LaTeX as MathML.

Raw HTML is escaped, images become links and links lead to the web or to mail only, so a model can neither run a script
nor make the browser call home.

Text that a model writes is rendered again and again while it grows, and some of it costs a thousand times the usual
5 ms per 1000 characters (nested brackets, Java without an end). So every unit is bounded and remembered: what a
paragraph, an item, a cell or a piece of code became is looked up as long as its characters are the same, and what is
beyond the limits, in characters or in time, is shown as it was written.
"""
from __future__ import annotations

import json
import re
import time
from functools import lru_cache
from html import escape

from markdown_it import MarkdownIt
from markdown_it.rules_inline.emphasis import tokenize
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.dollarmath.index import math_inline_dollar
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from app.formulas import formula
from app.strings import TEXT

SECONDS = 1.0  # for one rendering of a text: what is not done by then stays as it was written
TEXT_CHARS = 100_000  # of a text that are looked at for blocks
PARAGRAPH_CHARS = 5_000  # a paragraph, list item or cell: emphasis and brackets cost up to the square
CODE_CHARS = 20_000  # of a block of code that are coloured, in pieces of
PIECE_CHARS = 2_000
# Pygments knows many more; some take seconds for 2,000 spaces, in which no other thread runs.
LANGUAGES = frozenset("""
    python python3 py pycon java javascript js typescript ts tsx jsx c cpp c++ csharp c# cs go golang rust rs ruby rb
    php swift kotlin scala dart lua perl pl r julia haskell hs ocaml elixir erlang clojure lisp scheme fsharp sql
    mysql postgresql bash sh shell zsh console powershell ps1 bat batch html xml css scss sass less json json5 yaml toml
    ini dockerfile docker makefile make cmake diff markdown md latex tex matlab octave fortran asm nasm cuda verilog
    vhdl groovy graphql protobuf nginx vim objective-c objc zig nim d pascal delphi prolog solidity terraform hcl vue
    django jinja http awk sed vbnet cobol ada tcl""".split())
_LINK = re.compile(r"(https?://|mailto:)", re.IGNORECASE)
_DISPLAY = re.compile(r"\\\[|\\begin\{((?:equation|align|alignat|gather|multline|flalign)\*?)\}")
_BARE_LINK = re.compile(r"https?://[^\s<>\"`|\\^{}。，、；：！？）」』】》]+", re.IGNORECASE)
_CJK = re.compile("[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef]")
_TASK = re.compile(r"\[([ xX])\] ")
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


def render(text: str) -> str:
    """The whole text as HTML."""
    growing = Growing()
    growing.update(text)
    return "".join(growing.blocks)


class Growing:
    """HTML blocks of a growing text; `update` says from which block on they changed."""

    def __init__(self):
        self.blocks: list[str] = []
        self._kept = 0  # blocks that are complete
        self._start = 0  # where in the text the first incomplete block begins

    def update(self, text: str) -> int:
        """Take in the longer text; the index of the first block that may differ from before."""
        first, start = self._kept, self._start
        rest = text[start:max(start, TEXT_CHARS)]
        env: dict = {"until": time.monotonic() + SECONDS}
        groups = _top_level(_BLOCKS.parse(rest, env))
        env["links"] = json.dumps(env.get("references", {}))
        blocks = [_BLOCKS.renderer.render(tokens, _BLOCKS.options, env) for tokens in groups]
        if len(groups) > 1 and groups[-1][0].map:
            lines = rest.splitlines(keepends=True)
            self._start += sum(len(line) for line in lines[:groups[-1][0].map[0]])
            self._kept += len(groups) - 1
        beyond = text[max(start, TEXT_CHARS):]
        self.blocks[first:] = [*blocks, f"<p>{_plain(beyond)}</p>"] if beyond else blocks
        return first


def _plain(text: str) -> str:
    return escape(text).replace("\n", "<br>\n")


def _put_off(state) -> None:
    """In place of the rule that looks into every paragraph at once."""
    for token in state.tokens:
        if token.type == "inline":
            token.type = "words"


def _words(self, tokens, index, options, env) -> str:
    content = tokens[index].content
    task = _TASK.match(content) if index > 1 and tokens[index - 2].type == "list_item_open" else None
    if task:
        content = ("☐ " if task[1] == " " else "☑ ") + content[task.end():]
    if len(content) > PARAGRAPH_CHARS or time.monotonic() > env["until"]:
        return _plain(content)
    return _inline(content, env["links"])


@lru_cache(1000)
def _inline(text: str, links: str) -> str:
    return _INLINE.renderInline(text, {"references": json.loads(links)})


def _top_level(tokens: list) -> list[list]:
    groups: list[list] = []
    for token in tokens:
        if token.level == 0 and token.nesting >= 0:
            groups.append([])
        groups[-1].append(token)
    return groups


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


def _display(state, start: int, end: int, silent: bool) -> bool:
    r"""\[ ... \] and \begin{align} ... over several lines: what begins with + or - in there is no list. As in TeX, a
    blank line ends it; one that is still growing stays as it is written until it is closed."""
    first = state.src[state.bMarks[start] + state.tShift[start]:state.eMarks[start]]
    opening = _DISPLAY.match(first)
    if not opening or state.is_code_block(start):
        return False
    closing = f"\\end{{{opening[1]}}}" if opening[1] else "\\]"
    last = next((line for line in range(start, end) if closing in _line(state, line) or state.isEmpty(line)), end - 1)
    whole = "\n".join(_line(state, line) for line in range(start, last + 1)).strip()
    closed = whole.endswith(closing) and len(whole) > len(opening[0]) + len(closing)
    if not closed and (last + 1 < end or last == start):
        return False  # something else, or for the paragraph to read
    if not silent:
        state.line = last + 1
        token = state.push("math_block" if closed else "growing_math", "", 0)
        token.content = whole if opening[1] or not closed else whole[2:-2]
        token.map = [start, state.line]
    return True


def _line(state, line: int) -> str:
    return state.src[state.bMarks[line] + state.tShift[line]:state.eMarks[line]]


def _growing_math(self, tokens, index, options, env) -> str:
    return f"<p>{_plain(tokens[index].content)}</p>"


def _no_money(dollar):
    """$a$ is a formula, $HOME/$USER none: no letter comes behind the closing dollar."""
    def rule(state, silent: bool) -> bool:
        before, n_tokens, pending = state.pos, len(state.tokens), state.pending
        if not dollar(state, silent):
            return False
        if state.src[before:before + 2] == "$$" or not state.src[state.pos:state.pos + 1].isalnum():
            return True
        state.pos, state.pending = before, pending
        del state.tokens[n_tokens:]
        return False
    return rule


def _bare_link(state, silent: bool) -> bool:
    """An address that stands there by itself; what ends the sentence is none of it."""
    begun = re.search(r"(?<![\w:])https?$", state.pending[-7:], re.IGNORECASE) if state.src[state.pos] == ":" else None
    found = begun and not state.linkLevel and _BARE_LINK.match(state.src, state.pos - len(begun[0]))
    if not found:
        return False
    address = found[0]
    while address[-1] in ".,;:!?*_~'" or address[-1] in ")]" and address.count(address[-1]) > address.count(
            {")": "(", "]": "["}[address[-1]]):
        address = address[:-1]
    if address.endswith("/") and address.count("/") == 2:  # nothing but the scheme
        return False
    if not silent:
        state.pending = state.pending[:-len(begun[0])]
        state.push("link_open", "a", 1).attrs = {"href": state.md.normalizeLink(address)}
        state.push("text", "", 0).content = address
        state.push("link_close", "a", -1)
    state.pos += len(address) - len(begun[0])
    return True


def _beside_cjk(emphasis):
    """Chinese, Japanese and Korean have no spaces: emphasis may begin and end beside their letters and marks."""
    def rule(state, silent: bool) -> bool:
        before, n_delimiters = state.pos, len(state.delimiters)
        if not emphasis(state, silent):
            return False
        left, right = state.src[before - 1:before], state.src[state.pos:state.pos + 1]
        if state.src[before] == "*" and (_CJK.match(left) or _CJK.match(right)):
            for each in state.delimiters[n_delimiters:]:
                each.open, each.close = not right.isspace() and bool(right), not left.isspace() and bool(left)
        return True
    return rule


def _line_break(state, silent: bool) -> bool:
    """<br>, which models write into the cells of tables; no other HTML is anything but text."""
    found = _BREAK.match(state.src, state.pos)
    if not found:
        return False
    if not silent:
        state.push("hardbreak", "br", 0)
    state.pos = found.end()
    return True


def _fence(self, tokens, index, options, env) -> str:
    token = tokens[index]
    language = token.info.strip().split(" ")[0] if token.info else ""
    label = f'<span class="lang">{escape(language)}</span>'
    button = f'<button type="button" class="copy-code">{escape(TEXT["copy"])}</button>'
    code = "".join(_piece(piece, language, env) for piece in _pieces(token.content))
    return (f'<div class="code"><div class="code-head">{label}{button}</div>'
            f'<pre tabindex="0"><code>{code}</code></pre></div>\n')


def _pieces(code: str) -> list[str]:
    """Whole lines each, where possible up to a blank one. What is added to the code changes only the last piece."""
    pieces, start, end, blank = [], 0, 0, 0
    for line in code[:CODE_CHARS].splitlines(keepends=True):
        while end > start and end + len(line) - start > PIECE_CHARS:
            cut = blank if blank > start + PIECE_CHARS // 2 else end
            pieces.append(code[start:cut])
            start = cut
        end += len(line)
        blank = blank if line.strip() else end
    return [*pieces, code[start:CODE_CHARS], code[CODE_CHARS:]]


def _piece(code: str, language: str, env: dict) -> str:
    if language.lower() not in LANGUAGES or len(code) > PIECE_CHARS or time.monotonic() > env["until"]:
        return escape(code)
    return _coloured(code, language)


@lru_cache(500)
def _coloured(code: str, language: str) -> str:
    html = highlight(code, get_lexer_by_name(language, stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True))
    return html if code.endswith("\n") else html.removesuffix("\n")


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
                 renderer=formula)
    markdown.inline.ruler.before("escape", "bracket_math", _bracket_math)
    markdown.inline.ruler.at("math_inline", _no_money(math_inline_dollar(False, False, True)))
    markdown.inline.ruler.before("escape", "line_break", _line_break)
    markdown.inline.ruler.before("escape", "bare_link", _bare_link)
    markdown.inline.ruler.at("emphasis", _beside_cjk(tokenize))
    markdown.block.ruler.before("list", "display", _display, {"alt": ["paragraph", "reference", "blockquote", "list"]})
    markdown.validateLink = lambda address: bool(_LINK.match(address))
    for name, rule in (("fence", _fence), ("image", _image), ("link_open", _link_open), ("words", _words),
                       ("growing_math", _growing_math)):
        markdown.add_render_rule(name, rule)
    markdown.add_render_rule("code_block", _fence)
    return markdown


_INLINE, _BLOCKS = _build(), _build()
_BLOCKS.core.ruler.at("inline", _put_off)
