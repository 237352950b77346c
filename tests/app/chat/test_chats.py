"""Conversations: the tree of versions, undo, search, migrations with a backup, files in and out; which experts
its answers picked."""
from __future__ import annotations

import sqlite3
from types import SimpleNamespace

import numpy as np
import pytest

from app.chat import schema
from app.chat.chats import Chats
from app.chat.habits import KeptHabits
from app.chat.import_export import export_json, export_markdown
from app.chat.picks import KeptPicks
from engine import Picks, UserError
from tests.app.chat.imported import import_text


@pytest.fixture
def chats(tmp_path):
    chats = Chats(tmp_path / "chats.db")
    yield chats
    chats.close()


def talk(chats, *texts, conversation=None):
    """A conversation with alternating questions and answers; the messages."""
    conversation = conversation or chats.create()
    messages, parent = [], conversation.leaf_id
    for i, text in enumerate(texts):
        messages.append(chats.add(conversation.id, parent, "user" if i % 2 == 0 else "assistant", text))
        parent = messages[-1].id
    return conversation, messages


def texts(chats, conversation):
    return [message.text for message in chats.path(conversation.id)]


def test_versions_are_siblings_and_showing_one_brings_back_what_followed_it(chats):
    conversation, (question, first, follow) = talk(chats, "q", "first", "follow")
    second = chats.add(conversation.id, question.id, "assistant", "second")
    assert texts(chats, conversation) == ["q", "second"]
    assert chats.versions(conversation.id)[second.id] == [first.id, second.id]
    chats.show(first.id)
    assert texts(chats, conversation) == ["q", "first", "follow"]
    assert chats.versions(conversation.id)[follow.id] == [follow.id]


def test_a_branch_is_a_copy_that_leaves_the_source_alone(chats):
    conversation, messages = talk(chats, "q", "a", "q2", "a2")
    branch = chats.branch(messages[1].id)
    assert texts(chats, branch) == ["q", "a"]
    chats.add(branch.id, branch.leaf_id, "user", "other")
    assert texts(chats, conversation) == ["q", "a", "q2", "a2"]


def test_delete_can_be_undone_until_the_sweep(chats, monkeypatch):
    conversation, _ = talk(chats, "keep me")
    chats.delete(conversation.id)
    assert chats.conversations() == [] and chats.search("keep") == []
    with pytest.raises(UserError):
        chats.conversation(conversation.id)
    chats.restore(conversation.id)
    assert texts(chats, conversation) == ["keep me"]
    chats.delete(conversation.id)
    chats.close()
    monkeypatch.setattr("app.chat.chats.UNDO_SECONDS", -1)
    again = Chats(chats.file)
    assert again._rows("SELECT count(*) FROM messages")[0][0] == 0
    again.close()


def test_pinned_conversations_come_first_and_names_are_one_line(chats):
    old, new = chats.create("old"), chats.create("new")
    chats.pin(old.id, True)
    chats.rename(new.id, "  two\nlines ")
    assert [c.title for c in chats.conversations()] == ["old", "two lines"]


@pytest.mark.parametrize("query", ["boat*", "AND", "sea OR (", "100%", "NEAR(", "-boat", "bo", '"quoted"', "BOAT sea"])
def test_search_takes_any_text_as_words(chats, query):
    conversation, _ = talk(chats, "A boat on the sea", "The sea OR land, AND then 100% \"quoted\" near( it), a boat")
    assert [found["id"] for found in chats.search(query)] == [conversation.id]


@pytest.mark.parametrize("query", ["", " ", '"', "ozean", "boat ozean", "%", "_"])
def test_search_for_what_is_not_there_finds_nothing(chats, query):
    talk(chats, "A boat on the sea")
    assert chats.search(query) == []


def test_search_finds_titles_marks_words_and_follows_edits(chats):
    conversation, (question, answer) = talk(chats, "Where is the boat?", "")
    chats.rename(conversation.id, "Harbour 100%_")
    assert chats.search("harbour")[0]["id"] == conversation.id
    assert chats.search("100%_")[0]["id"] == conversation.id
    assert chats.search("boat")[0]["snippet"] == "Where is the \x02boat\x03?"
    chats.save(answer.id, text="behind the lighthouse", thinking="", status="done", stats={})
    assert chats.search("lighth")[0]["message_id"] == answer.id
    chats.save(answer.id, text="nowhere", thinking="", status="done", stats={})
    assert chats.search("lighthouse") == []


def test_what_ran_when_the_program_ended_is_marked(chats):
    conversation, (question,) = talk(chats, "q")
    answer = chats.add(conversation.id, question.id, "assistant", "half an", status="running")
    chats.close()
    again = Chats(chats.file)
    assert (again.message(answer.id).status, again.message(answer.id).text) == ("interrupted", "half an")
    again.close()


def test_json_keeps_every_version_and_markdown_the_shown_one(chats):
    conversation, (question, first) = talk(chats, "q\n\n## You\nnot a heading of ours", "first")
    second = chats.add(conversation.id, question.id, "assistant", "second", thinking="hm", stats={"tokens": 3},
                       attachments=[{"name": "a.txt", "text": "x"}])
    chats.rename(conversation.id, "Title: ünï")
    exported, markdown, before = (export_json(chats, [conversation.id]), export_markdown(chats, conversation.id),
                                  texts(chats, conversation))
    chats.delete(conversation.id)
    (copy,) = import_text(chats, exported)
    path = chats.path(copy.id)
    assert copy.title == "Title: ünï" and texts(chats, copy) == before
    assert path[-1].thinking == "hm" and path[-1].stats == {"tokens": 3} and path[-1].attachments == second.attachments
    assert len(chats.versions(copy.id)[path[-1].id]) == 2
    chats.delete(copy.id)
    (copy,) = import_text(chats, markdown)
    assert copy.title == "Title: ünï" and texts(chats, copy) == before
    assert export_markdown(chats, copy.id) == markdown


@pytest.mark.parametrize("text", ["", "hello", "{", "{}", '{"format": "floechat-conversations", "version": 1}',
                                  '{"format": "floechat-conversations", "version": 99, "conversations": []}',
                                  '{"format": "floechat-conversations", "version": 1, "conversations": [{"title": "t", '
                                  '"messages": [{"id": 1, "parent_id": 7, "role": "user", "text": ""}]}]}',
                                  '{"format": "floechat-conversations", "version": 1, "conversations": [{"title": "t", '
                                  '"messages": [{"id": 1, "parent_id": null, "role": "root", "text": ""}]}]}'])
def test_a_foreign_file_is_refused_in_one_sentence_and_changes_nothing(chats, text):
    with pytest.raises(UserError):
        import_text(chats, text)
    assert chats.conversations() == []


def test_a_migration_backs_up_first_and_a_failed_one_changes_nothing(tmp_path):
    path = tmp_path / "chats.db"
    first = Chats(path)
    talk(first, "old text")
    first.close()

    def add_column(db):
        db.execute("ALTER TABLE conversations ADD COLUMN colour TEXT")

    def break_it(db):
        db.execute("DELETE FROM messages")
        raise sqlite3.OperationalError("broken on purpose")

    with pytest.raises(UserError):
        schema.open_database(path, [*schema.MIGRATIONS, break_it])
    with sqlite3.connect(f"{path}.v{len(schema.MIGRATIONS)}.backup") as backup:
        assert backup.execute("SELECT text FROM messages").fetchall() == [("old text",)]
    db = schema.open_database(path, [*schema.MIGRATIONS, add_column])
    assert db.execute("PRAGMA user_version").fetchone()[0] == len(schema.MIGRATIONS) + 1
    assert db.execute("SELECT text, colour FROM messages JOIN conversations").fetchone()[0] == "old text"
    db.close()
    with pytest.raises(UserError, match="newer"):
        schema.open_database(path)


def test_a_damaged_file_is_refused_with_a_way_out(tmp_path):
    path = tmp_path / "chats.db"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(UserError, match="move it away"):
        Chats(path)
    assert path.read_bytes().startswith(b"this is no database")


def test_waiting_messages_keep_their_order_and_leave_once(chats):
    conversation = chats.create()
    first, second = chats.wait(conversation.id, "one"), chats.wait(conversation.id, "two")
    assert [item["text"] for item in chats.waiting()] == ["one", "two"]
    assert chats.unwait(first)["text"] == "one" and chats.unwait(first) is None
    assert [item["id"] for item in chats.waiting()] == [second]


@pytest.mark.parametrize("words", ["北京", "長城", "検索", "を検索して", "서울", "北京 boat"])
def test_a_run_of_letters_inside_a_longer_one_is_found(chats, words):
    """In scripts without blanks between words, of two letters and of more; and no longer when the text has changed."""
    text = "我住在北京的長城旁邊。全文を検索してください。대한민국서울특별시 boat"
    _, (message, _) = talk(chats, text, "其他")
    (hit,) = chats.search(words)
    assert hit["message_id"] == message.id and hit["snippet"].count("\x02") == len(words.split())
    assert chats.search("京北") == [] and chats.search("を検索せよ") == []
    chats.save(message.id, text="nothing", thinking="", status="done", stats={})
    assert chats.search(words) == []


# Which experts answers picked

PICKS = Picks(1, 2, 3, (3, 1))


def models(folder: str = "a") -> SimpleNamespace:
    """What of the open model is asked for; `warmed` are the picks that it was told."""
    warmed = []
    return SimpleNamespace(folder=folder, engine=object(), warm=warmed.append, warmed=warmed)


def test_answers_add_up_and_another_model_begins_anew(chats):
    talk, other, model = chats.create().id, chats.create().id, models()
    kept = KeptPicks(chats, model)
    assert kept.of(talk) is None
    for _ in range(2):
        kept.keep(talk, PICKS)
    assert kept.of(talk) == PICKS + PICKS and kept.of(other) is None
    assert KeptPicks(chats, models()).of(talk) == PICKS + PICKS  # after a restart
    model.folder = "b"
    assert kept.of(talk) is None
    kept.keep(talk, Picks(2, 1, 1, (1, 0)))
    assert kept.of(talk).tokens == 1
    kept.keep(talk, PICKS)  # the folder holds something else now
    assert kept.of(talk) == PICKS


def test_it_goes_with_its_conversation_and_damage_is_none(chats):
    talk, kept = chats.create().id, KeptPicks(chats, models())
    kept.keep(talk, PICKS)
    chats.keep_picks(talk, "a", b"damaged")
    assert kept.of(talk) is None
    kept.keep(talk, PICKS)
    chats._rows("DELETE FROM conversations WHERE id=?", talk)
    assert kept.of(talk) is None
    kept.keep(talk, PICKS)  # deleted while its answer was written
    assert chats.picks(talk) == ("", None)


def test_a_conversation_that_is_opened_is_warmed_for_once(chats):
    one, other, empty = (chats.create().id for _ in range(3))
    model = models()
    kept = KeptPicks(chats, model)
    kept.keep(one, PICKS)
    kept.keep(other, PICKS + PICKS)
    kept.opened(other)  # it was the last anyway
    kept.opened(empty)
    assert model.warmed == []
    for _ in range(2):
        kept.opened(one)
    kept.opened(other)
    assert model.warmed == [PICKS, PICKS + PICKS]
    model.engine = object()  # opened anew: nothing is near
    kept.opened(other)
    assert len(model.warmed) == 3


# What is learned while a person chats


def test_habits_are_learned_only_where_they_are_wanted_and_are_gone_when_asked_to(chats):
    """One file a model, below the data folder; a draft is told to the model, and stored nowhere."""
    told = []
    model = SimpleNamespace(folder="models/a", expect=lambda draft, habits: told.append((draft, habits.path)),
                            learn=lambda asked, picks, habits: habits.add(np.ones(2, np.float32), picks))
    kept, folder = KeptHabits(chats, model), chats.file.parent / "habits"
    above = chats.path(talk(chats, "What?")[0].id)
    kept.answered(above, PICKS)
    kept.written("A dra")
    assert told == [] and kept.size() == 0 and not folder.exists() and not kept.wanted
    kept.want(True)
    kept.answered(above, PICKS)
    kept.written("A dra")
    kept.written(" ")
    model.folder = "other/a"
    kept.answered(above, PICKS)
    assert [draft for draft, _ in told] == ["A dra"] and len(list(folder.iterdir())) == 2
    again = KeptHabits(chats, model)
    assert again.wanted and again.size() == sum(file.stat().st_size for file in folder.iterdir()) > 0
    assert not any(b"A dra" in file.read_bytes() for file in folder.iterdir())
    kept.forget()
    assert again.size() == 0 and list(folder.iterdir()) == []
