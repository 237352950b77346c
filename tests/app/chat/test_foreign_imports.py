"""Exports of other programs become conversations, with versions, thinking, dates and names; twice is once; large ones
are read in little memory."""
from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from app.chat.chats import Chats
from app.chat.import_export import export_json, import_file
from app.chat.imports import documents
from engine import UserError
from tests.app.chat import foreign_exports as foreign
from tests.app.chat.imported import import_text

FORMATS = {
    "chatgpt": json.dumps([foreign.chatgpt()]).encode(), "claude": json.dumps([foreign.CLAUDE]).encode(),
    "open webui": json.dumps([foreign.OPEN_WEBUI]).encode(), "lm studio": json.dumps(foreign.LM_STUDIO).encode(),
    "jan": foreign.jan_zip()}


@pytest.fixture
def chats(tmp_path):
    chats = Chats(tmp_path / "chats.db")
    yield chats
    chats.close()


def taken(chats, raw):
    return import_file(chats, io.BytesIO(raw))


def only(chats, name):
    (made,) = taken(chats, FORMATS[name]).made
    return made, chats.path(made.id)


def test_chatgpt_a_tree_with_thinking_a_tool_and_versions(chats):
    made, path = only(chats, "chatgpt")
    assert (made.title, made.created_at, made.updated_at) == ("Boats", 1700000000.25, 1700000020.75)
    assert [m.text for m in path[2:]] == ["And stones?", "They sink."] and path[0].text == "What floats?"
    assert path[0].created_at == 1700000000.5 and [a["name"] for a in path[0].attachments] == ["boat.png"]
    assert "only the name" in path[0].attachments[0]["text"]
    assert path[1].text == f"Boats do ([wiki](https://example.org)). {foreign.SCRIPT}"
    assert path[1].thinking == ("**Thinking of boats**\n\nWood is light.\n\n```python\nfloat(1)\n```\n\n```\n1.0\n```")
    assert path[1].stats == {"model": "gpt-5"}
    versions = chats.versions(made.id)
    assert [chats.message(m).text for m in versions[path[1].id]][1] == "Corks do."
    assert [chats.message(m).text for m in versions[path[2].id]] == ["And stones?", "And ice?"]


def test_claude_blocks_attachments_and_versions(chats):
    made, path = only(chats, "claude")
    assert made.title == "Harbour" and made.created_at == 1767323045.0
    assert [(a["name"], a["text"][:6]) for a in path[0].attachments] == [("log.txt", "wind 3"), ("map.pdf", "(The e")]
    assert path[1].text == "Old form." and len(path) == 2  # the newest
    other = chats.message(chats.versions(made.id)[path[1].id][0])
    assert other.thinking == "Calm.\n\nmade" and other.text == "**Log**\n\n````\n```\nx\n```\n````\n\nWind of three."


def test_open_webui_history_reasoning_and_system_prompt(chats):
    made, path = only(chats, "open webui")
    assert made.pinned and made.settings == {"system": "You are a sailor."} and made.updated_at == 1750000100
    assert path[0].attachments == [{"name": "moon.txt", "text": "The moon pulls."}]
    assert (path[1].text, path[1].thinking) == ("The moon.", "Moon & sun.\nBoth.")
    assert path[1].stats == {"model": "qwen3"} and len(chats.versions(made.id)[path[1].id]) == 2
    bare = json.dumps(foreign.OPEN_WEBUI["chat"] | {"title": "Bare"}).encode()
    assert [m.text for m in chats.path(taken(chats, bare).made[0].id)] == ["Why tides?", "The moon."]


def test_lm_studio_selected_versions_and_steps(chats):
    made, path = only(chats, "lm studio")
    assert made.created_at == 1760000000 and made.settings == {"system": "Short."}
    assert [m.text for m in path] == ["A knot?", "Bowline.", "Thanks"] and path[1].thinking == "Which?"
    assert [a["name"] for a in path[0].attachments] == ["1 - rope.png"] and path[1].stats == {"model": "gpt-oss-20b"}
    first = chats.message(chats.versions(made.id)[path[1].id][0])
    assert (first.text, first.thinking) == ("Reef.", "Hm")


def test_jan_a_folder_a_thread_and_messages_alone(chats):
    made, path = only(chats, "jan")
    assert (made.title, made.created_at, made.settings) == ("Sails", 1770000000, {"system": "Be kind."})
    assert [(m.text, m.thinking, m.created_at) for m in path] == [
        ("A sail?", "", 1770000001), ("Canvas.", "Cloth.", 1770000002)]
    assert [a["name"] for a in path[0].attachments] == ["image 1"] and path[1].stats == {"model": "jan-nano"}
    lines = "\n".join(map(json.dumps, foreign.JAN_MESSAGES)).encode()
    assert len(chats.path(taken(chats, lines).made[0].id)) == 2


def test_a_zip_as_it_is_downloaded_and_what_lies_beside(chats):
    raw = foreign.zipped(chat_dot_html="<html>", user_dot_json={"id": "me"}, message_feedback_dot_json=[{"id": 1}],
                         **{"conversations-000_dot_json": [foreign.chatgpt("A"), foreign.chatgpt("B", later=1)],
                            "conversations-001_dot_json": [foreign.chatgpt("C", later=2)]})
    assert len(taken(chats, raw).made) == 3 and len(chats.conversations()) == 3


@pytest.mark.parametrize("name", FORMATS)
def test_imported_twice_is_recognised_and_a_continued_one_grows(chats, name):
    made, path = only(chats, name)
    again = taken(chats, FORMATS[name])
    assert (again.made, again.grown, again.known) == ([], [], 1) and len(chats.conversations()) == 1
    chats.add(made.id, path[-1].id, "user", "Went on here")
    assert taken(chats, FORMATS[name]).known == 1
    chats.delete(made.id)
    assert len(taken(chats, FORMATS[name]).made) == 1  # somebody wants it back


def test_a_later_export_brings_what_is_new(chats):
    made, path = only(chats, "chatgpt")
    later = taken(chats, json.dumps([foreign.chatgpt(turns=3), foreign.chatgpt("Other", later=1)]).encode())
    assert [(c.id, c.updated_at) for c in later.grown] == [(made.id, made.updated_at)] and len(later.made) == 1
    assert chats.path(made.id)[:4] == path and len(chats.path(made.id)) == 8
    chats.add(made.id, chats.path(made.id)[-1].id, "user", "mine")
    assert taken(chats, json.dumps([foreign.chatgpt(turns=4)]).encode()).grown
    assert chats.path(made.id)[-1].text == "mine"  # what is shown stays where somebody went on


OURS = {"title": "Ropes", "created_at": 1.7e9, "messages": [
    {"id": 1, "parent_id": None, "role": "user", "text": "A rope?"},
    {"id": 2, "parent_id": 1, "role": "assistant", "text": "Hemp."},
    {"id": 3, "parent_id": 1, "role": "assistant", "text": "Jute."}]}
WEBUI_CHAT = foreign.OPEN_WEBUI["chat"]
WEBUI_HALF = WEBUI_CHAT["history"] | {"messages": {key: each for key, each in WEBUI_CHAT["history"]["messages"].items()
                                                   if key != "3"}}
GROWN = {  # a conversation, and the same some time later
    "chatgpt": (foreign.chatgpt(), foreign.chatgpt(turns=2)),
    "claude": (foreign.CLAUDE | {"chat_messages": foreign.CLAUDE["chat_messages"][:2]}, foreign.CLAUDE),
    "open webui": (foreign.OPEN_WEBUI | {"chat": WEBUI_CHAT | {"history": WEBUI_HALF}}, foreign.OPEN_WEBUI),
    "lm studio": (foreign.LM_STUDIO | {"messages": foreign.LM_STUDIO["messages"][:2]}, foreign.LM_STUDIO),
    "jan": (foreign.JAN_MESSAGES[:1], foreign.JAN_MESSAGES),
    "ours": (OURS | {"messages": OURS["messages"][:2]}, OURS)}


def together(name, *which):
    """A file in which the conversation stands several times, as it was at first (0) or later (1)."""
    found = [GROWN[name][i] for i in which]
    if name == "jan":
        return foreign.zipped(**{f"threads__{i}__thread_dot_json": foreign.JAN_THREAD for i, _ in enumerate(found)}, **{
            f"threads__{i}__messages_dot_jsonl": "\n".join(map(json.dumps, each)) for i, each in enumerate(found)})
    return json.dumps({"format": "floechat-conversations", "version": 1, "conversations": found}
                      if name == "ours" else found).encode()


def tree(chats, number):
    """Each message with what is above it."""
    texts = {message.id: message.text for message in chats.messages(number)}
    return sorted((texts.get(message.parent_id, ""), message.role, message.text) for message in chats.messages(number))


@pytest.mark.parametrize("name", GROWN)
def test_one_conversation_several_times_in_a_file_is_one(tmp_path, name):
    """New, or here already as it was at first: nothing is lost, and nothing is there twice."""
    alone, new, here = (Chats(tmp_path / f"{which}.db") for which in ("alone", "new", "here"))
    whole = tree(alone, taken(alone, together(name, 1)).made[0].id)
    both = taken(new, together(name, 0, 1, 1, 0))
    assert (len(both.made), both.grown, both.known) == (1, [], 0) and tree(new, both.made[0].id) == whole
    (first,) = taken(here, together(name, 0)).made
    later = taken(here, together(name, 1, 0, 1))
    assert ([c.id for c in later.grown], later.made, later.known) == ([first.id], [], 0)
    assert tree(here, first.id) == whole and len(here.conversations()) == 1
    for chats in (alone, new, here):
        chats.close()


def test_lines_of_one_of_jans_threads_stand_twice(chats):
    lines = "\n".join(map(json.dumps, foreign.JAN_MESSAGES[:1] + foreign.JAN_MESSAGES)).encode()
    assert [m.text for m in chats.path(taken(chats, lines).made[0].id)] == ["A sail?", "Canvas."]


def test_another_programs_word_format_is_not_ours(chats):
    """And a fence that stands in the code of an import does not end it."""
    document = foreign.chatgpt() | {"format": "v2"}
    document["mapping"]["a2"]["message"]["content"] = {"content_type": "code", "language": "md", "text": "```\nx\n```"}
    (made,) = taken(chats, json.dumps([document]).encode()).made
    assert "````md\n```\nx\n```\n````" in [message.text for message in chats.messages(made.id)]


def test_our_own_json_keeps_its_dates_and_is_recognised(chats, tmp_path):
    made, _ = only(chats, "chatgpt")
    text = export_json(chats, [made.id])
    assert import_text(chats, text) == []
    other = Chats(tmp_path / "other.db")
    (copy,) = import_text(other, text)
    assert (copy.created_at, copy.updated_at) == (made.created_at, made.updated_at)
    assert [m.created_at for m in other.path(copy.id)] == [m.created_at for m in chats.path(made.id)]
    assert import_text(other, text) == [] and len(other.conversations()) == 1
    other.close()


def test_half_an_emoji_is_replaced(chats):
    document = foreign.chatgpt("Half \ud83d of one")
    document["mapping"]["a2"]["message"]["content"]["parts"] = ["\udc00 \\ud800 😀"]
    (made,) = taken(chats, json.dumps([document]).encode()).made
    assert made.title == "Half \ufffd of one"
    assert any(m.text == "\ufffd \\ud800 😀" for m in chats.messages(made.id))


BAD = {
    "another json": b'[{"a": 1}]', "a picture": b"\x89PNG\r\n", "an empty list": b"[]", "no letter": b"",
    "half": FORMATS["chatgpt"][:-40], "half a zip": FORMATS["jan"][:-30],
    "a zip of nothing": foreign.zipped(a_dot_txt="x"),
    "a text": b'"conversations"', "texts": b'["mapping"]',
    "one good, one of a number": b"[%s, 7]" % FORMATS["chatgpt"][1:-1],
    "a good one, a foreign one": b'[%s, {"a": 1}]' % FORMATS["claude"][1:-1],
    "a circle": json.dumps([foreign.chatgpt() | {"mapping": {
        "a": {"parent": "b", "message": None}, "b": {"parent": "a", "message": None}}}]).encode(),
    "deep": b'[{"mapping": ' + b"[" * 100_000, "a good one before a broken one":
        foreign.zipped(a_dot_json=[foreign.chatgpt()], b_dot_json='[{"mapping": {]')}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence_and_nothing_stays(chats, name):
    with pytest.raises(UserError) as refused:
        taken(chats, BAD[name])
    said = str(refused.value)
    assert said.startswith("Nothing was imported") and said.endswith(".") and len(said) < 300
    assert chats.conversations() == [] and chats._rows("SELECT * FROM messages") == []
    assert not chats._rows("SELECT * FROM conversations")


def test_odd_values_in_a_foreign_file_break_nothing(chats):
    odd = [None, 1, "x", [], {}, [None], {"parts": [1, None, {}]}, 1e300, -1, True]
    for name, document in (("mapping", foreign.chatgpt()), ("chat_messages", foreign.CLAUDE)):
        for value in odd:
            part = document[name]
            one = next(iter(part.values()))["message"] if isinstance(part, dict) else part[0]
            for key in list(one or {}):
                changed = json.loads(json.dumps(document))
                place = changed[name]
                place = [n["message"] for n in place.values() if n["message"]] if isinstance(place, dict) else place
                for message in place:
                    message[key] = value
                changed["create_time" if name == "mapping" else "created_at"] = value
                try:
                    made = taken(chats, json.dumps([changed]).encode()).made
                except UserError:  # all above themselves
                    assert chats.conversations() == []
                    continue
                for each in made:
                    export_json(chats, [each.id])
                    chats.delete(each.id)


def test_a_bomb_is_refused_before_it_is_unpacked(chats):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as box, box.open("conversations.json", "w") as entry:
        for _ in range(66):
            entry.write(b'[{"mapping":{"a":"' + b" " * (1 << 20))
    with pytest.raises(UserError, match="larger than can be read"):
        taken(chats, out.getvalue())
    assert documents.FILE_BYTES == 2 << 30


def test_a_large_export_is_read_in_little_memory(tmp_path):
    """12 MB in conversations of 50 kB, in a process that may take no more than a part of them beside what it is."""
    if not Path("/proc/self/status").exists():  # ru_maxrss begins with what the parent had
        pytest.skip("no way to ask for a process's own peak of memory")
    whole = json.dumps(foreign.chatgpt(turns=30)).encode()
    n = (12 << 20) // len(whole)
    with open(tmp_path / "conversations.json", "wb") as file:
        file.write(b"[")
        for i in range(n):
            file.write(whole.replace(b"1700000000.25", b"17%08d.25" % i) + (b"," if i < n - 1 else b"]"))
    code = f"""
from app.chat.chats import Chats
from app.chat.import_export import import_file

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

chats = Chats({str(tmp_path / "chats.db")!r})
before, shares = peak(), []
with open({str(tmp_path / "conversations.json")!r}, "rb") as file:
    taken = import_file(chats, file, shares.append)
assert shares == sorted(shares) and len(shares) > 8 and shares[-1] == 1, shares
print(len(taken.made), (peak() - before) >> 10)
chats.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    made, grown_mb = done.stdout.split() if done.returncode == 0 else (0, done.stderr)
    assert int(made) == n and int(grown_mb) < 30, done.stdout + done.stderr[-2000:]
