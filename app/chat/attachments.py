"""The text of an attached file: a PDF's pages, or a text in whatever encoding it was written. Everything has an end."""
from __future__ import annotations

import codecs
import io
import time
from pathlib import PurePath

from app.incoming import ATTACHMENT_BYTES
from app.strings import TEXT
from engine import UserError

PDF_PAGES = 1000
PDF_SECONDS = 20.0  # for all pages; looked at between two
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def text_of(name: str, data: bytes) -> tuple[str, str]:
    """-> the text, and the encoding that was recognised, "" for UTF-8 and PDF. UserError where there is no text."""
    name = PurePath(name).name
    if data.startswith(b"%PDF-") or name.lower().endswith(".pdf"):
        return _within(name, _pdf(name, data)), ""
    text, encoding = _decoded(name, data)
    return _within(name, text), encoding


def _within(name: str, text: str) -> str:
    if len(text.encode("utf-8", "replace")) > ATTACHMENT_BYTES:
        raise UserError(TEXT["too_large"].format(name=name))
    return text


def _decoded(name: str, data: bytes) -> tuple[str, str]:
    known = next((encoding for mark, encoding in _BOMS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(known)
        encoding = known if known.startswith(("utf-16", "utf-32")) else ""
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes
        found = from_bytes(data).best() if b"\0" not in data else None
        if found is None:
            raise UserError(TEXT["not_text"].format(name=name)) from None
        text, encoding = str(found), found.encoding
    if "\0" in text:
        raise UserError(TEXT["not_text"].format(name=name))
    return text, encoding


def _pdf(name: str, data: bytes) -> str:
    from pypdf import PdfReader
    try:
        reader = PdfReader(io.BytesIO(data))
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else _pages(name, reader)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes of the reader
        raise UserError(TEXT["pdf_broken"].format(name=name)) from error
    if locked:
        raise UserError(TEXT["pdf_locked"].format(name=name))
    text = "\n\n".join(page.strip() for page in pages).replace("\0", "").strip()
    if not text:
        raise UserError(TEXT["pdf_pictures"].format(name=name))
    return text


def _pages(name: str, reader) -> list[str]:
    end, pages = time.monotonic() + PDF_SECONDS, []
    if len(reader.pages) > PDF_PAGES:
        raise UserError(TEXT["pdf_long"].format(name=name, most=PDF_PAGES))
    for page in reader.pages:
        if time.monotonic() > end:
            raise UserError(TEXT["pdf_slow"].format(name=name))
        pages.append(page.extract_text())
        if sum(map(len, pages)) > ATTACHMENT_BYTES:
            raise UserError(TEXT["too_large"].format(name=name))
    return pages
