"""What is read out of an attached file, and the sentence where nothing can be."""
from __future__ import annotations

import io

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from app.chat import attachments
from app.chat.attachments import text_of
from engine import UserError


def pdf(*words: str, password: str = "") -> bytes:
    """A page for each text."""
    writer = PdfWriter()
    for text in words:
        page = writer.add_blank_page(300, 300)
        font = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1"),
                                 NameObject("/BaseFont"): NameObject("/Helvetica")})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): DictionaryObject(
            {NameObject("/F1"): font})})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_the_pages_of_a_pdf_are_read_in_order():
    assert text_of("a.pdf", pdf("The boat is red.", "The sea is blue.")) == ("The boat is red.\n\nThe sea is blue.", "")


@pytest.mark.parametrize("data, said", [
    (b"%PDF-1.7 and nothing", "damaged"), (pdf("secret", password="x"), "password"), (pdf(""), "only pictures"),
    (pdf("a")[:-200], "")])
def test_a_pdf_that_cannot_be_read_is_one_sentence(data, said):
    try:
        text, _ = text_of("a.pdf", data)
        assert not said and text == "a"  # a reader may mend the end of a file
    except UserError as error:
        assert said in str(error) and str(error).startswith("a.pdf") and str(error).endswith(".")


def test_a_pdf_has_an_end(monkeypatch):
    monkeypatch.setattr(attachments, "PDF_PAGES", 1)
    with pytest.raises(UserError, match="more than 1 pages"):
        text_of("a.pdf", pdf("a", "b"))
    monkeypatch.setattr(attachments, "PDF_PAGES", 9)
    monkeypatch.setattr(attachments, "PDF_SECONDS", -1.0)
    with pytest.raises(UserError, match="takes too long"):
        text_of("a.pdf", pdf("a", "b"))


GERMAN = "Grüße aus Österreich, schöne Häuser und süße Äpfel für alle Mädchen. " * 4
CHINESE = "你好，世界。这是一个用来测试编码的中文文本，里面有很多常用的汉字。" * 4


@pytest.mark.parametrize("text, encoding", [(GERMAN, "utf-8"), (GERMAN, "utf-8-sig"), (GERMAN, "utf-16"),
                                            (GERMAN, "cp1252"),
                                            (CHINESE, "gbk"), (CHINESE, "utf-16"), (CHINESE, "utf-32")])
def test_a_text_in_another_encoding_is_read_and_that_is_said(text, encoding):
    found, said = text_of("a.txt", text.encode(encoding))
    assert found == text and bool(said) is (not encoding.startswith("utf-8"))


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0\0\0", b"a\0b"])
def test_what_is_no_text_is_refused(data):
    with pytest.raises(UserError, match="is not a text file"):
        text_of("a.png", data)
