"""What an exported conversation is called, in any script."""
from __future__ import annotations

import re
from urllib.parse import unquote

import pytest

from app.http.api import _file_name
from app.http.download import download


@pytest.mark.parametrize("title, kept", [
    ("你好，世界", "你好世界"), ("Grüße", "Grüße"), ("Boat: a/story?", "Boat astory"), ("", "conversation"),
    ("///", "conversation")])
def test_a_title_of_any_script_is_kept(title, kept):
    header = download("", f"{_file_name(title)}.json").headers["content-disposition"]
    plain, name = re.fullmatch(r"attachment; filename=\"([^\"]*)\"; filename\*=UTF-8''(.*)", header).groups()
    assert unquote(name) == f"{kept}.json"
    assert plain == (f"{kept}.json" if kept.isascii() else "conversation.json")
