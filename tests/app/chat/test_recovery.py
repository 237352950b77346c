"""A damaged chat database: what can be read stays, the damaged file is kept, and the same program goes on."""
from __future__ import annotations

import json
import os
import random
import sqlite3
from contextlib import closing
from dataclasses import asdict

import pytest

from app.chat import recovery
from app.chat.chat_settings import ChatSettings, Drafts, Presets
from app.chat.chats import Chats
from app.chat.context_window import to_prompt
from app.chat.import_export import export_json
from engine import UserError
from tests.app.chat.imported import import_text
from tests.support.waiting import until

PAGE = 8192
TALKS, TURNS = 12, 20


def fill(chats):
    """Conversations on some hundred pages."""
    chats.set_preference("welcomed", True)
    for n in range(TALKS):
        conversation = chats.create(f"Talk {n}", {"system": "You are a poet."})
        parent = None
        for turn in range(TURNS):
            role = "assistant" if turn % 2 else "user"
            parent = chats.add(conversation.id, parent, role, f"turn {turn} of talk {n} " + "sea " * 300).id


def harm(path, kind, noise):
    """Write something else over pages of the file, as a failing disk or another program would; not over the first."""
    data = bytearray(path.read_bytes())
    last = len(data) // PAGE - 1
    if kind == "cut":
        del data[noise.randrange(2 * PAGE, len(data)):]
    for page in noise.sample(range(1, last), noise.choice((1, 2, 5))) if kind != "cut" else ():
        other = noise.randrange(1, last) * PAGE
        data[page * PAGE:(page + 1) * PAGE] = {"noise": noise.randbytes(PAGE), "zeros": bytes(PAGE),
                                               "another page": data[other:other + PAGE]}[kind]
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """The bytes of a database with conversations, in one file."""
    path = tmp_path_factory.mktemp("filled") / "chats.db"
    chats = Chats(path)
    fill(chats)
    chats.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path.read_bytes()


def use(chats):
    """What a person does with the page; whatever it meets, it ends and the next thing works."""
    found = chats.conversations()
    for conversation in found:
        chats.path(conversation.id)
        chats.versions(conversation.id)
    chats.search("sea")
    new = chats.create("New")
    question = chats.add(new.id, None, "user", "Is anybody there?")
    chats.save(chats.add(new.id, question.id, "assistant").id, text="Yes.", thinking="", status="done", stats={})
    assert [message.text for message in chats.path(new.id)] == ["Is anybody there?", "Yes."]
    assert new.id in [found["id"] for found in chats.search("anybody there")]
    return found


def look_whole(path):
    """The next day: damage that nobody has met is found when the backup is made; -> what is told of it."""
    backup = path.with_name("chats.db.backup")
    if backup.exists():
        os.utime(backup, (0, 0))
    chats = Chats(path)
    until(lambda: chats.mended or backup.exists() and backup.stat().st_mtime > 0)
    chats.close()
    return chats.mended


@pytest.mark.parametrize("moment", ["before", "while running"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["noise", "zeros", "another page", "cut"])
def test_what_is_written_over_the_file_takes_only_its_own_rows_along(tmp_path, filled, kind, seed, moment):
    path, noise = tmp_path / "chats.db", random.Random(f"{kind} {seed}")
    path.write_bytes(filled)
    if moment == "while running":
        chats = Chats(path)
        harm(path, kind, noise)
    else:
        harm(path, kind, noise)
        chats = Chats(path)
    use(chats)
    use(chats)
    chats.close()
    for told in filter(None, (chats.mended, look_whole(path))):
        assert path.with_name("chats.db.damaged-1").is_file() and "chats.db.damaged-" in told
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("page", [0, 1, 2, 4, 40, 100])
def test_with_a_backup_nothing_is_lost_that_stood_in_it(tmp_path, filled, page):
    path = tmp_path / "chats.db"
    path.write_bytes(filled)
    assert look_whole(path) == ""
    chats = Chats(path)
    newer = chats.create("Newer than the backup")
    chats.add(newer.id, None, "user", "not in the backup")
    chats.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(path, "r+b") as file:
        file.seek(page * PAGE)
        file.write(b"x" * PAGE)
    chats = Chats(path)
    talks = [talk for talk in use(chats) if talk.title.startswith("Talk")]
    assert [len(chats.path(talk.id)) for talk in talks] == [TURNS] * TALKS
    assert all(talk.settings == {"system": "You are a poet."} for talk in talks)
    assert chats.preference("welcomed", False)
    chats.close()


def test_where_nothing_can_be_read_a_start_is_refused_and_a_running_program_goes_on(tmp_path, filled):
    path = tmp_path / "chats.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="move it away"):
        Chats(path)
    assert [file.name for file in tmp_path.iterdir()] == ["chats.db"]
    path.write_bytes(b"")
    chats = Chats(path)
    fill(chats)
    chats._rows("PRAGMA wal_checkpoint(TRUNCATE)")
    chats._rows("PRAGMA cache_size=0")
    path.write_bytes(b"no database" * 1000)
    use(chats)
    assert str(tmp_path / "chats.db.damaged-1") in chats.mended
    chats.close()


def test_a_backup_is_made_of_what_is_whole_and_replaced_after_a_day(tmp_path, filled):
    path, backup = tmp_path / "chats.db", tmp_path / "chats.db.backup"
    Chats(path).close()
    assert not backup.exists()  # nothing was said yet
    path.write_bytes(filled)
    for file in tmp_path.glob("chats.db-*"):
        file.unlink()
    assert look_whole(path) == "" and backup.exists()
    first = backup.read_bytes()
    chats = Chats(path)
    chats.create("Another")
    assert recovery.back_up(path) is None and backup.read_bytes() == first
    os.utime(backup, (0, 0))
    assert recovery.back_up(path) is None
    chats.close()
    copy = Chats(backup)
    assert len(copy.conversations()) == TALKS + 1
    copy.close()


# What stands in a row

BAD_JSON = ["", "{", "[1]", "7", "null", "NaN", '{"a": NaN}', "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900,
            '{"stop": 5, "policy": ["oldest"], "temperature": "hot", "top_k": 1e999, "thinking": "on", "system": 5}',
            '{"a": ' + "9" * 5000 + "}", b"\xff\xfe", 5, 1.5]


@pytest.mark.parametrize("value", BAD_JSON, ids=lambda value: repr(value)[:30])
def test_a_bad_row_harms_no_other(tmp_path, value):
    chats = Chats(tmp_path / "chats.db")
    good, bad = chats.create("Good", {"top_k": 5}), chats.create("Bad")
    question = chats.add(bad.id, None, "user", "q", attachments=[{"name": "a", "text": "b"}])
    chats.add(bad.id, question.id, "assistant", "a")
    chats.wait(bad.id, "next")
    for table, column in (("conversations", "settings"), ("messages", "stats"), ("messages", "attachments"),
                          ("waiting", "attachments")):
        chats._rows(f"UPDATE {table} SET {column}=? WHERE id<>?", value, good.id if table == "conversations" else 0)
    for name in ("presets", "drafts", "model_titles", "welcomed"):
        chats._rows("INSERT INTO preferences VALUES (?,?)", name, value)
    read_everything(chats)
    assert chats.conversation(good.id).settings == {"top_k": 5}
    chats.close()


def read_everything(chats):
    """As the page, the answers and the export do."""
    drafts, presets = Drafts(chats), Presets(chats)
    for conversation in chats.conversations():
        path = chats.path(conversation.id)
        to_prompt(path, ChatSettings.of(conversation.settings).system, True)
        ChatSettings.of(conversation.settings).sampling()
        json.dumps([drafts.settings(str(conversation.id)), [asdict(message) for message in path]], allow_nan=False)
        import_text(chats, export_json(chats, [conversation.id]))
        chats.branch(path[-1].id) if path else None
    presets.keep("Mine", {"top_k": 3})
    assert presets.chosen("Mine", {}) == {"top_k": 3} and presets.choices()
    drafts.change("tab", lambda stored: stored | {"top_k": 4})
    assert drafts.begin("tab").settings == {"top_k": 4}
    assert isinstance(chats.preference("welcomed", False), bool) and isinstance(chats.waiting(), list)
    json.dumps(chats.waiting(), allow_nan=False)


def test_a_circle_of_messages_is_walked_once(tmp_path):
    chats = Chats(tmp_path / "chats.db")
    conversation = chats.create("Circle")
    ids, parent = [], None
    for text in ("one", "two", "three"):
        parent = chats.add(conversation.id, parent, "user", text).id
        ids.append(parent)
    for above, below in ((ids[2], ids[0]), (ids[1], ids[1]), (999, ids[0])):
        chats._rows("PRAGMA foreign_keys=OFF")
        chats._rows("UPDATE messages SET parent_id=? WHERE id=?", above, below)
        for message in ids:
            chats.show(message)
            assert len(chats.path(conversation.id)) <= 3
        assert set(chats.versions(conversation.id)) == set(ids)
        read_everything(chats)
    chats.close()


@pytest.mark.parametrize("column, value", [
    ("role", "root"), ("role", 5), ("status", "odd"), ("text", b"\xff\x00\xfe"), ("text", 5), ("thinking", b"x"),
    ("created_at", "yesterday"), ("created_at", float("inf")), ("text", "CAST(X'ff41' AS TEXT)")])
def test_a_message_with_nonsense_in_it_is_shown_as_well_as_can_be(tmp_path, column, value):
    chats = Chats(tmp_path / "chats.db")
    conversation = chats.create("Odd")
    question = chats.add(conversation.id, None, "user", "q")
    chats.add(conversation.id, question.id, "assistant", "the answer")
    place = value if str(value).startswith("CAST") else "?"
    chats._rows(f"UPDATE messages SET {column}={place} WHERE id=?", *([value] if place == "?" else []), question.id)
    assert chats.path(conversation.id)[1].text == "the answer"
    read_everything(chats)
    chats.close()


def test_without_room_for_a_recovery_that_is_said_and_tried_again(tmp_path, filled, monkeypatch):
    path = tmp_path / "chats.db"
    path.write_bytes(filled)
    chats = Chats(path)
    with open(path, "r+b") as file:
        file.seek(PAGE)
        file.write(b"x" * (len(filled) - PAGE))

    def full(*names):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(recovery.shutil, "copyfile", full)
        for _ in range(2):
            with pytest.raises(UserError, match="No space left"):
                use(chats)
    use(chats)
    assert "damaged-" in chats.mended
    chats.close()
