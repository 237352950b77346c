"""Files that a person imports: looked at whole before anything is stored, whatever they hold."""
from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from app.chat import chats as chats_module
from app.chat.chats import Chats
from app.chat.import_export import export_json, export_markdown
from engine import UserError
from tests.app.chat.imported import import_text

DEEP = 100_000


@pytest.fixture
def chats(tmp_path):
    chats = Chats(tmp_path / "chats.db")
    yield chats
    chats.close()


def message(**changed):
    return {"id": 1, "parent_id": None, "role": "user", "text": "q"} | changed


def conversation(**changed):
    return {"title": "t", "messages": [message(), message(id=2, parent_id=1, role="assistant")]} | changed


def document(*conversations, **changed):
    """A good conversation first: nothing of it may be stored beside a bad one."""
    return json.dumps({"format": "floechat-conversations", "version": 1,
                       "conversations": [conversation(), *conversations]} | changed)


def with_message(**changed):
    return document(conversation(messages=[message(**changed)]))


RAW = "RAW"  # put in place of this word after json.dumps


def raw(written, **where):
    return with_message(**where).replace(f'"{RAW}"', written)


HOSTILE = {
    "nothing": "", "a word": "hello", "half": '{"format": "floechat-conversations", "conv', "a list": "[1, 2]",
    "a number": "7", "an object": "{}", "another format": document(format="other"),
    "no version": document(version=None),
    "a version in words": document(version="1"), "version 0": document(version=0),
    "version true": document(version=True),
    "no list": document(conversations={}), "a conversation of a number": document(7), "null": document(None),
    "title 5": document(conversation(title=5)), "no title": document({"messages": []}),
    "title of 201": document(conversation(title="x" * 201)),
    "title of 10 MB": document(conversation(title="x" * 10**7)),
    "messages of an object": document(conversation(messages={"a": 1})), "no messages": document({"title": "t"}),
    "settings of a list": document(conversation(settings=[1])), "stop 5": document(conversation(settings={"stop": 5})),
    "hot": document(conversation(settings={"temperature": 1e9})),
    "a policy": document(conversation(settings={"policy": "x"})),
    "system of a list": document(conversation(settings={"system": ["x"]})),
    "pinned in words": document(conversation(pinned="yes")), "leaf of a list": document(conversation(leaf=[1])),
    "leaf in words": document(conversation(leaf="1")), "leaf of 2^63": document(conversation(leaf=2**63)),
    "id null": with_message(id=None), "id in words": with_message(id="1"), "id 0": with_message(id=0),
    "id of 2^63": with_message(id=2**63), "id 1.5": with_message(id=1.5), "id true": with_message(id=True),
    "an id twice": document(conversation(messages=[message(), message()])), "below itself": with_message(parent_id=1),
    "below nobody": with_message(parent_id=9), "below one that follows": document(conversation(
        messages=[message(parent_id=2), message(id=2)])),
    "role root": with_message(role="root"), "role of a list": with_message(role=["user"]),
    "text null": with_message(text=None), "text of a number": with_message(text=1.0),
    "a text that is too long": with_message(text="x" * 1_000_001), "thinking of a list": with_message(thinking=[]),
    "an odd status": with_message(status="odd"), "stats of a list": with_message(stats=[]),
    "attachments of numbers": with_message(attachments=[1]), "attachments of an object": with_message(attachments={}),
    "an attachment without text": with_message(attachments=[{"name": "a"}]),
    "an attachment with a NUL": with_message(attachments=[{"name": "a", "text": "\0"}]),
    "a large attachment": with_message(attachments=[{"name": "a", "text": "x" * 1_000_001}]),
    "101 attachments": with_message(attachments=[{"name": "a", "text": "b"}] * 101),
    "attachments of 3 MB": with_message(attachments=[{"name": "a", "text": "b" * 1_000_000}] * 3),
    "created at NaN": raw("NaN", created_at=RAW), "created at infinity": raw("1e999", created_at=RAW),
    "created in words": with_message(created_at="now"),
    "an id of 5000 digits": raw("9" * 5000, id=RAW),
    "deep text": raw("[" * DEEP + "]" * DEEP, text=RAW),
    "deep stats": raw('{"a":' * DEEP + "1" + "}" * DEEP, stats=RAW),
    "deep": "{" * DEEP, "deep and open": '{"conversations":' + "[" * DEEP,
    "messages without number": document(conversation(messages=[RAW])).replace(f'"{RAW}"', "{}," * 200_000 + "{}"),
    "lists without number": document(conversation(messages=[RAW])).replace(f'"{RAW}"', "[]," * 2_000_000 + "[]"),
    "quotes": "{" + '"' * 5_000_000, "stats without number": raw(
        "{" + ",".join(f'"k{n}":[]' for n in range(100_000)) + "}", stats=RAW, role="root"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_refused_in_one_sentence_and_changes_nothing(chats, name):
    with pytest.raises(UserError) as refused:
        import_text(chats, HOSTILE[name])
    said = str(refused.value)
    assert said.endswith(".") and "\n" not in said and len(said) < 400, said
    assert chats.conversations() == [] and chats._rows("SELECT * FROM messages") == []
    assert len(import_text(chats, document())) == 1


@pytest.mark.parametrize("seed", range(50))
def test_a_file_with_anything_changed_is_refused_or_stored_whole(chats, seed):
    """One place of a good export holds something else."""
    noise = random.Random(seed)
    whole = conversation(settings={"top_k": 5, "stop": ["x"]}, leaf=2, pinned=True)
    whole["messages"][1] |= {"thinking": "hm", "status": "done", "created_at": 1.0, "stats": {"tokens": 3},
                             "attachments": [{"name": "a", "text": "b"}]}
    tree = json.loads(document(whole))
    place = tree
    while isinstance(place, (dict, list)) and place:
        holder, key = place, noise.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place = holder[key]
        if noise.random() < 0.15:
            break
    holder[key] = noise.choice([None, True, -1, 0, 2**63, 1e300, "", "x" * 300, "\0", [], [1], {}, {"a": [None]}, RAW])
    odd = noise.choice(["NaN", "-Infinity", "[" * 5000 + "]" * 5000, '"\\udfff"'])
    text = json.dumps(tree).replace(f'"{RAW}"', odd)
    try:
        made = import_text(chats, text)
    except UserError as refused:
        assert chats.conversations() == [] and str(refused).endswith(".")
    else:
        again = import_text(chats, export_json(chats, [one.id for one in made]))
        for one in (*made, *again):
            export_markdown(chats, one.id)
    assert chats.path(import_text(chats, document())[0].id)[0].text == "q"


def test_a_failure_in_the_middle_stores_nothing(chats, monkeypatch):
    text, stored = document(conversation(), conversation()), []

    def fails_late(db, source, messages, hidden):
        stored.append(source)
        if len(stored) == 3:
            raise OSError("the disk is gone")
        return insert(db, source, messages, hidden)
    insert = chats_module.insert
    monkeypatch.setattr(chats_module, "insert", fails_late)
    with pytest.raises(OSError):
        import_text(chats, text)
    assert len(stored) == 3 and chats.conversations() == []


def test_a_large_honest_file_is_taken(chats):
    messages = [message(id=n, parent_id=n - 1 or None, text=f'{n}, "quoted" [and] {{braced}}\n' * 20,
                        stats={"tokens": n, "hit_rate": 0.5, "model": "Boat", "thinking_s": "long", "odd": [1]})
                for n in range(1, 3001)]
    made = import_text(chats, document(conversation(messages=messages)))[1]
    path = chats.path(made.id)
    assert [m.text for m in path] == [m["text"] for m in messages]
    assert path[0].stats == {"tokens": 1, "hit_rate": 0.5, "model": "Boat"}  # what the page can show


def test_memory_stays_within_some_times_the_files_size(tmp_path):
    """60 MB of empty lists, of messages and of numbers, in a process that may take 1.5 GB of memory."""
    pytest.importorskip("resource")  # its limit is the check; ru_maxrss begins with what the parent had
    code = f"""
import resource, sys
from app.chat.chats import Chats
from app.chat.imports.documents import CONVERSATION_CHARACTERS as IMPORT_BYTES
from tests.app.chat.imported import import_text
from engine import UserError
resource.setrlimit(resource.RLIMIT_AS, ({3 << 29},) * 2)
chats = Chats({str(tmp_path / "chats.db")!r})
from pathlib import Path
for part in ("[],", "{{}},", "1,", '"",', '{{"id":1,"parent_id":null,"role":"user","text":""}},'):
    text = '{{"format": "floechat-conversations", "version": 1, "conversations": [{{"title": "", "messages": ['
    try:
        import_text(chats, text + part * (IMPORT_BYTES // len(part)) + "1]}}]}}")
    except UserError as error:
        print(error)
chats.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("Nothing was imported") == 5, done.stdout + done.stderr[-2000:]
