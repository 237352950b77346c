r"""LaTeX of a model to MathML: environments and \ce{...} in words that the converter knows, limits below in a display,
nothing but MathML's own elements. What cannot be read is shown as it was written."""
from __future__ import annotations

import re
from html import escape, unescape
from xml.etree.ElementTree import Element, tostring

from latex2mathml.converter import convert_to_element

MATH_CHARS = 2_000
# Environments that the converter knows by another name.
_SAME = {"matrix": ("gathered", "gather", "multline", "equation"), "cases": ("dcases", "rcases"),
         "align*": ("aligned", "alignedat", "align", "alignat", "flalign", "split")}
_RENAMED = {name: known for known, names in _SAME.items() for name in names}
_ENVIRONMENT = re.compile(r"\\(begin|end)\{(" + "|".join(_RENAMED) + r")\*?\}(?:\{\d+\})?")
_NUMBERING = re.compile(r"\\(?:nonumber|notag)(?![A-Za-z])|\\label\{[^{}]*\}")
_ARGUMENT = re.compile(r"\\arg(?![A-Za-z])")
_UPRIGHT = re.compile(r"\\mathrm\{([A-Za-z])\}")
_UNKNOWN = re.compile(r"\\[A-Za-z]+")
# What has its limits below in a display, besides the sums and products that the converter knows.
_WITH_LIMITS = {"lim", "max", "min", "sup", "inf", *"⋂⋃⋀⋁⨀⨁⨂⨄⨆"}
_BELOW = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}
_TAG = re.compile(r"math|m[a-z]+")
_VALUE = re.compile(r"[\w .#%+-]*")
_ATTRIBUTES = {"display", "mathvariant", "stretchy", "linethickness", "accent", "columnalign", "rowspacing", "fence",
               "columnspacing", "columnlines", "rowlines", "displaystyle", "scriptlevel", "movablelimits", "width",
               "minsize", "maxsize", "mathcolor", "lspace", "rspace", "separator", "form"}
_CHEMISTRY = re.compile(r"\\ce\{((?:[^{}]|\{[^{}]*\})*)\}")
# One piece of a chemical formula after the other: its pattern, and what stands for it in LaTeX ({1}: the first group).
_PIECES = tuple((re.compile(pattern), made) for pattern, made in (
    (r"\s*(?:<=>>?|<<=>|<-->)\s*", r" \rightleftharpoons "), (r"\s*<->\s*", r" \leftrightarrow "),
    (r"\s*->\[([^\[\]{}]*)\]\s*", r" \overset{{\text{{{1}}}}}{{\longrightarrow}} "),
    (r"\s*->\s*", r" \rightarrow "),
    (r"\s*<-\s*", r" \leftarrow "), (r"\s+\+\s+", " + "),
    (r"\s+\^(?=\s|$)", r" \uparrow "), (r"\s+v(?=\s|$)", r" \downarrow "),
    (r"\s*[.*]\s*", r" \cdot "), (r"\s+", r"\ "), (r"\((s|l|g|aq)\)", r"\text{{({1})}}"),
    (r"((?:[A-Z][a-z]?)+|e(?=-|\^))", r"\mathrm{{{1}}}"), (r"(?<=[A-Za-z)\]])(\d+)", "_{{{1}}}"),
    (r"_\{?(\d+|[a-z])\}?", "_{{{1}}}"), (r"\^\{([\d+-]+)\}", "^{{{1}}}"), (r"\^(\d*[+-])", "^{{{1}}}"),
    (r"(?<=[A-Za-z\d)\]])([+-])(?=\s|$|\))", "^{{{1}}}"), (r"(\d+(?:/\d+)?)", "{1}"), (r"([()\[\]])", "{1}"),
    (r"-", "-"), (r"=", "="), (r"#", r"\equiv ")))


def formula(text: str, options: dict) -> str:
    """MathML of one formula; options: "display_mode", whether it has lines of its own."""
    try:
        if len(text) > MATH_CHARS:
            raise ValueError("too long")
        display = bool(options.get("display_mode"))
        element = convert_to_element(_known(text), display="block" if display else "inline")
        _harmless(element)
        if display and r"\nolimits" not in text:
            _limits_below(element)
        return tostring(element, encoding="unicode")
    except Exception:  # any text may come out of a model; TeX that cannot be read is shown as it is
        return f"<code>{escape(text)}</code>"


def _known(text: str) -> str:
    """The same formula in what the converter knows. ValueError for chemistry that is not read here."""
    text = _ENVIRONMENT.sub(lambda found: f"\\{found[1]}{{{_RENAMED[found[2]]}}}", text)
    text = _ARGUMENT.sub(r"\\operatorname{arg}", _NUMBERING.sub("", text))
    text = _CHEMISTRY.sub(lambda found: f"{{{_chemistry(found[1].strip())}}}", text)
    return _UPRIGHT.sub(r"\\text{\1}", text)  # the converter makes a single letter an ordinary one


def _chemistry(text: str) -> str:
    r"""\ce{2H2 + O2 -> 2H2O}: elements, counts, charges, states, arrows and simple bonds of mhchem."""
    made, at = "", 0
    while at < len(text):
        for pattern, latex in _PIECES:
            if found := pattern.match(text, at):
                made, at = made + latex.format(found[0], *found.groups()), found.end()
                break
        else:
            raise ValueError(f"no chemistry: {text[at:at + 10]}")
    return made


def _harmless(root: Element) -> None:
    """Only MathML's own elements and harmless attributes: \\text and \\href would let a model write anything."""
    for element in root.iter():
        if not _TAG.fullmatch(element.tag):
            raise ValueError(element.tag)
        element.attrib = {name: value for name, value in element.attrib.items()
                          if name in _ATTRIBUTES and _VALUE.fullmatch(value)}
        element.text = unescape(element.text) if element.text else element.text  # the converter writes &#x221A;
        if element.tag == "mi" and _UNKNOWN.fullmatch(element.text or ""):
            raise ValueError(element.text)


def _limits_below(root: Element) -> None:
    for element in root.iter():
        if element.tag in _BELOW and _has_limits(element[0]):
            element.tag = _BELOW[element.tag]


def _has_limits(base: Element) -> bool:
    if base.tag == "mo" and len(base):  # \mathop{...}; an operator has no elements within
        base.tag = "mrow"
        return True
    return base.tag == "mo" and (base.text in _WITH_LIMITS or base.get("movablelimits") == "true")
