"""What comes from outside: the bodies of requests, and how large anything may be. What is wrong is said in a sentence.

Strict: a number is no text, and a name that is not known is refused instead of ignored. Limits come before any work.
"""
from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, JsonValue, ValidationError, model_validator

from app.strings import TEXT
from engine import UserError

BODY_BYTES = 16 << 20  # of a request; an imported file may be larger
FILE_BYTES = 2 << 30  # of an imported file, and of the JSON in a zip; assets/ui/conversation/import.js says so at once
TEXT_CHARACTERS = 1_000_000  # of one message: more than any context holds
TITLE_CHARACTERS = 200
ATTACHMENTS = 100
ATTACHMENT_BYTES = 1_000_000
ATTACHED_CHARACTERS = 2_000_000  # of all together

Id = Annotated[int, Field(ge=1, lt=1 << 63)]  # what SQLite can count
ONE_LINE = r"^[^\x00-\x1f\x7f]*$"
Name = Annotated[str, Field(min_length=1, max_length=250, pattern=ONE_LINE)]
Title = Annotated[str, Field(max_length=TITLE_CHARACTERS)]
Words = Annotated[str, Field(max_length=TEXT_CHARACTERS)]
Place = Annotated[str, Field(max_length=4096, pattern=ONE_LINE)]  # a path of this computer
Context = Annotated[int, Field(ge=1, lt=1 << 31)]
NearBytes = Annotated[int, Field(ge=0, lt=1 << 60)]
DEPTH = 50  # of values within values that are looked at; nothing that is stored lies deeper


def whole_letters(text: str) -> str:
    """With a replacement character for half an emoji, which no file and no program takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not text.isascii() else text


def _whole(value: object, depth: int = 0) -> object:
    """JSON whose texts are whole letters, names included."""
    if isinstance(value, str):
        return whole_letters(value)
    if depth < DEPTH and isinstance(value, list):
        return [_whole(each, depth + 1) for each in value]
    if depth < DEPTH and isinstance(value, dict):
        return {_whole(name): _whole(each, depth + 1) for name, each in value.items()}
    return value


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _of_whole_letters(cls, wish: object) -> object:
        return _whole(wish)


class Attachment(Body):
    name: Annotated[str, Field(max_length=1000), AfterValidator(lambda name: PurePath(name).name)]
    text: str

    @model_validator(mode="after")
    def _check(self) -> Attachment:
        if len(self.text.encode()) > ATTACHMENT_BYTES:
            raise UserError(TEXT["text_large"].format(name=self.name))
        if "\0" in self.text:
            raise UserError(TEXT["not_text"].format(name=self.name))
        return self


def _bounded(files: list[Attachment]) -> list[Attachment]:
    if sum(len(file.text) for file in files) > ATTACHED_CHARACTERS:
        raise UserError(TEXT["too_much"].format(most=ATTACHED_CHARACTERS))
    return files


Attachments = Annotated[list[Attachment], FailFast(), Field(max_length=ATTACHMENTS), AfterValidator(_bounded)]


class Begin(Body):
    """draft: the name of the settings that were made before the first message."""

    draft: Name


class Change(Body):
    title: Title | None = None
    pinned: bool | None = None


class Settings(Body):
    """What changes of a conversation's settings, first to those of a preset; None takes one back."""

    preset: Name | None = None
    changes: Annotated[dict[str, JsonValue], Field(max_length=100)] = {}


class Preset(Body):
    name: Annotated[str, Field(max_length=1000)]


class Question(Body):
    text: Words = ""
    attachments: Attachments = []


class Written(Body):
    text: Words


class Named(Body):
    """A model: a name of the disk, of the catalogue or of the Hub."""

    name: Name


class Opening(Named):
    level: Annotated[str, Field(max_length=40)] | None = None
    context: Context | None = None
    near_bytes: NearBytes | None = None
    preset: Literal["lossless", "prefer_cached", "cached_only"] = "lossless"


class Fetching(Named):
    """file: which GGUF of several, "" for the only one or none. like: see `Adding`, "" what the repository names."""

    file: Place
    like: Place


class Adding(Body):
    """like: where the configuration of a GGUF file is, "" beside it."""

    path: Place
    like: Place = ""


class Dropped(Body):
    """What a browser tells of a file or folder that was dropped; bytes 0: of a folder."""

    name: Name
    bytes: Annotated[int, Field(ge=0, lt=1 << 60)]


class Measuring(Named):
    text: Place = ""


class Compressing(Named):
    """text: what the codes are to err less on, "" for ours; none: they are made without one."""

    text: Place | None = None


class Keeping(Body):
    folder: Place


class Welcomed(Body):
    done: bool


def what_is_wrong(error: dict) -> str:
    """The first of pydantic's errors as a person reads it; no sentence yet."""
    where = ".".join(str(part) for part in error["loc"] if part not in ("body", "query", "path"))
    if error["type"] == "missing":
        return TEXT["wrong_missing"].format(where=where or TEXT["wrong_whole"])
    if error["type"] == "extra_forbidden":
        return TEXT["wrong_unknown"].format(where=where[:100])
    if error["type"] in ("string_too_long", "too_long"):
        return TEXT["wrong_length"].format(where=where, most=error["ctx"]["max_length"])
    if error["type"] == "string_pattern_mismatch":
        return TEXT["wrong_line"].format(where=where)
    what = error["msg"].removeprefix("Value error, ").rstrip(".")
    return TEXT["wrong_value"].format(where=where or TEXT["wrong_whole"], what=what[:1].lower() + what[1:])


def refused(error: ValidationError) -> UserError:
    return UserError(TEXT["request_wrong"].format(
        what=what_is_wrong(error.errors(include_url=False, include_input=False)[0])))
