"""Answers that outlive a tab: one worker thread asks the engine, and pages only watch.

An answer is a message in the database from its first moment; its text grows in memory and is saved at least once a
second, so a reload, a closed tab or a kill loses at most that second. One engine means one answer at a time: what is
sent meanwhile waits in the database's queue, in order. Only `stop` ends an answer early.
A full disk stops the saving, not the answer: it is said, and saving goes on when there is room.
"""
from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace

from app.chat.chat_settings import ChatSettings
from app.chat.chats import Chats, Message
from app.chat.context_window import fit, joined, spoken
from app.chat.habits import KeptHabits
from app.chat.line import Line
from app.chat.picks import KeptPicks
from app.chat.titles import Titles
from app.library.open_model import Models
from app.remote.server import Servers
from app.strings import TEXT
from engine import Counters, Event, MachineError, Sampling, Stopped, UserError, preset_of

CHECKPOINT_SECONDS = 0.8
PAUSE_SECONDS = 1.0
SOON_SECONDS = 20.0  # a person waits for an answer no longer than a program that came so much earlier
AGAIN_TEMPERATURE = 0.7  # of one more version where the model itself recommends none: the same words are no version
_log = logging.getLogger(__name__)
_DONE = {"stop": "done", "length": "length", "stopped": "stopped", "error": "error"}


@dataclass
class Live:
    """The answer that is being written. `revision` grows with every change; texts only grow."""

    message_id: int
    conversation_id: int
    phase: str = "loading"
    note: str = ""
    text: str = ""
    thinking: str = ""
    stats: dict = field(default_factory=dict)
    revision: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


class Jobs:
    """The queue and its worker. Every method may be called from any thread; none of them waits for the engine."""

    def __init__(self, chats: Chats, models: Models, on_change: Callable[[], None] = lambda: None):
        self.chats = chats
        self.live: Live | None = None
        self.picks, self.habits = KeptPicks(chats, models), KeptHabits(chats, models)
        self.disk_trouble = ""
        self._models = models
        self._servers = Servers(chats)
        self._titles = Titles(chats, models)
        self.line = Line(self._titles.stop)
        self.on_change = on_change
        self._wake = threading.Condition()
        self._asked: list[Message] = []  # answers to write: fresh ones, or one to continue
        self._versions: set[int] = set()  # of those, the ones that should say something else than one beside them
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="answers", daemon=True)

    def start(self) -> None:
        self._worker.start()

    def close(self) -> None:
        """Stop the running answer, keep what it has, end the worker."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self.stop()
        self._worker.join(timeout=10)

    def send(self, conversation_id: int, text: str, attachments: list | None = None) -> dict:
        """A new question at the end of what is shown, or in the queue while the engine is busy."""
        if not text.strip() and not attachments:
            raise UserError(TEXT["empty_message"])
        conversation = self.chats.conversation(conversation_id)
        with self._wake:
            if self._busy() or self.chats.waiting():
                waiting_id = self.chats.wait(conversation_id, text, attachments)
                self._wake.notify_all()
                self.on_change()
                return {"waiting": waiting_id}
            return {"message": self._question(conversation.id, conversation.leaf_id, text, attachments)}

    def edit(self, message_id: int, text: str) -> dict:
        """A changed copy beside the message: a question gets a new answer, an answer simply is what it says now."""
        old = self.chats.message(message_id)
        if old.role == "assistant":
            new = self.chats.add(old.conversation_id, old.parent_id, "assistant", text, thinking=old.thinking,
                                 stats={"edited": True})
            self.on_change()
            return {"message": new.id}
        with self._wake:
            self._refuse_when_busy()
            return {"message": self._question(old.conversation_id, old.parent_id, text, old.attachments)}

    def regenerate(self, message_id: int) -> dict:
        """One more version of an answer (or the first answer to a question that has none)."""
        message = self.chats.message(message_id)
        with self._wake:
            self._refuse_when_busy()
            again = message.role == "assistant"
            answer = self._answer(message.conversation_id, message.parent_id if again else message.id)
            self._versions |= {answer} if again else set()
            return {"message": answer}

    def resume(self, message_id: int) -> dict:
        """Let the model go on with an answer that ended early."""
        with self._wake:
            self._refuse_when_busy()
            message = self.chats.message(message_id)
            self._ask(message)
            return {"message": message.id}

    def stop(self) -> None:
        live = self.live
        self._titles.stop()
        if live:
            live.stop.set()

    def _idle(self) -> bool:
        return not self._closed and not self._asked and not self.chats.waiting() and self.line.is_free

    def _busy(self) -> bool:
        return self.live is not None or bool(self._asked)

    def _refuse_when_busy(self) -> None:
        if self._busy():
            raise UserError(TEXT["busy"])

    def _question(self, conversation_id: int, parent_id: int | None, text: str, attachments: list | None) -> int:
        return self._begin(self.chats.add(conversation_id, parent_id, "user", text, attachments=attachments))

    def _begin(self, question: Message) -> int:
        self._titles.begin(question.conversation_id)
        return self._answer(question.conversation_id, question.id)

    def _answer(self, conversation_id: int, parent_id: int) -> int:
        answer = self.chats.add(conversation_id, parent_id, "assistant", status="running")
        self._ask(answer)
        return answer.id

    def _ask(self, answer: Message) -> None:
        self._asked.append(answer)
        self._titles.stop()
        if self.live is None:
            self.live = _live(answer)
        self._wake.notify_all()
        self.on_change()

    # The worker

    def _work(self) -> None:
        """One item after another, for as long as the program lives: what fails ends its item, never this."""
        while not self._closed:
            try:
                self._one()
            except BaseException as error:
                with suppress(Exception):
                    self._trouble(error)
                time.sleep(PAUSE_SECONDS)  # what fails again must not take the whole processor

    def _one(self) -> None:
        answer = self._next()
        if answer is None:
            return
        try:
            self._write(answer, self.live)
        finally:
            with self._wake:
                self.live = None
            self.on_change()
        if self._titles.improve(answer.conversation_id, self._idle):
            self.on_change()

    def _next(self) -> Message | None:
        """The next answer to write; None when there was none for a while."""
        with self._wake:
            if not self._asked and (question := self.chats.take()):
                self._begin(question)
            if not self._asked:
                self._wake.wait(1.0)
                return None
            answer = self._asked.pop(0)
            self.live = self.live or _live(answer)
            return answer

    def _write(self, answer: Message, live: Live) -> None:
        saver = _Saver(self, live)
        status = "error"
        try:
            status = self._stream(answer, live)
        except Stopped:
            status = "stopped"
        except (UserError, MachineError) as error:
            live.stats["error"] = str(error)
            if isinstance(error, MachineError):
                _log.warning("An answer: %s", error)
        except BaseException as error:
            live.stats["error"] = TEXT["answer_failed"].format(error=f"{type(error).__name__}: {error}")
        finally:
            saver.finish(status)

    def _stream(self, answer: Message, live: Live) -> str:
        wishes = ChatSettings.of(self.chats.conversation(answer.conversation_id).settings)
        above = self._given(answer)
        messages = spoken(above, wishes.system, wishes.keep_thinking)
        ask = self._elsewhere if wishes.remote else self._here
        meter = _Meter(live)
        with closing(ask(answer, live, wishes, messages)) as events:
            for event in events:
                phase = live.phase
                meter.take(event)
                if live.phase != phase:  # words are looked at by who draws them; the whole state is not told for each
                    self.on_change()
                if event.kind == "end":
                    if event.picks:
                        self.picks.keep(answer.conversation_id, event.picks)
                        self.habits.answered(above, event.picks)
                    return _ended(live, event)
        return "stopped" if live.stop.is_set() else "error"

    def _here(self, answer: Message, live: Live, wishes: ChatSettings, messages: list[dict]) -> Iterator[Event]:
        """The engine's events, once it is this answer's turn; none where a stop came before the model was open."""
        with self.line.turn(time.monotonic() + SOON_SECONDS, live.stop.is_set, patient=True, over=True):
            if engine := self._models.wait(live.stop):
                yield from self._asked_of(engine, answer, live, wishes, messages)

    def _asked_of(self, engine, answer: Message, live: Live, wishes: ChatSettings,
                  messages: list[dict]) -> Iterator[Event]:
        live.phase = "prefill"
        live.revision += 1
        info, sampling = engine.info, wishes.sampling()
        if answer.id in self._versions:
            self._versions.discard(answer.id)
            sampling, live.stats["certain"] = _another(sampling, info["sampling"])
        reserve = min(sampling.max_tokens or 256, info["context"] // 4)
        stopped, asked = live.stop.is_set, wishes.template()
        prompt = fit(messages, info["context"], reserve, wishes.policy,
                     lambda some: engine.count_tokens(some, asked, stopped), lambda one: engine.weigh(one, stopped))
        live.stats |= {"model": self._models.title, "level": self._models.level, "dropped": prompt.dropped,
                       "prompt_tokens": prompt.tokens}
        above = self._given(answer)
        if engine.folds_system and wishes.system.strip() and not any(m.stats.get("folded") for m in above):
            live.stats["folded"] = 1
        yield from engine.chat(prompt.messages, sampling, asked, live.stop)

    def _elsewhere(self, answer: Message, live: Live, wishes: ChatSettings, messages: list[dict]) -> Iterator[Event]:
        """Those of the server's model: what does not fit its context it refuses by itself."""
        self._versions.discard(answer.id)  # it draws anew by itself
        model = self._servers.model(wishes.remote)
        live.stats |= {"model": model.name, "server": model.place.host}
        live.phase = "asked"
        live.revision += 1
        self.on_change()
        with closing(model.chat(joined(messages), wishes.sampling(), wishes.template(), live.stop)) as events:
            yield from events

    def _given(self, answer: Message) -> list[Message]:
        """Everything above the answer, and the answer itself when it is to be continued."""
        path = self.chats.path(answer.conversation_id, answer.id)
        return path if answer.text else path[:-1]

    def _trouble(self, error: BaseException) -> None:
        """Said on the page until something has been saved."""
        said = TEXT["disk_trouble"] if waits_for_room(error) else TEXT["trouble"]
        said = said.format(error=error if isinstance(error, sqlite3.Error) else f"{type(error).__name__}: {error}")
        if said != self.disk_trouble:
            _log.error("Something failed beside an answer", exc_info=error)
            self.disk_trouble = said
            self.on_change()


def _another(sampling: Sampling, recommended: dict) -> tuple[Sampling, int]:
    """How one more version is drawn, and 1 where it can only be the same again, as the person has set it."""
    if sampling.temperature is None and not recommended["temperature"]:
        sampling = replace(sampling, temperature=AGAIN_TEMPERATURE)
    return sampling, int(sampling.temperature == 0 or sampling.seed is not None)


def _ended(live: Live, end: Event) -> str:
    """The status of an answer that is over. One without a word says so."""
    if end.reason == "error":
        live.stats["error"] = end.text
    elif end.reason == "stop" and not live.text.strip():
        live.stats["error"] = TEXT["empty_answer"]
        return "error"
    return _DONE[end.reason]


def waits_for_room(error: BaseException) -> bool:
    """Whether saving again later may work: a full disk, a database that another program holds."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xff
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class _Meter:
    """Turns the engine's events into the live answer's text and numbers."""

    def __init__(self, live: Live):
        self._live = live
        self._start = time.monotonic()
        self._reused: int | None = None  # prompt tokens that were still in the engine's cache

    def take(self, event: Event) -> None:
        live, now = self._live, time.monotonic() - self._start
        if event.kind in ("loading", "prefill"):
            live.phase, live.note = event.kind, event.text
            if event.kind == "prefill":
                self._reused = event.n_tokens if self._reused is None else self._reused
                live.stats["prefilled"] = event.n_tokens
        elif event.kind in ("thinking", "answer"):
            self._first(now)
            live.phase = "decode"
            if event.kind == "thinking":
                live.thinking += event.text
                live.stats["thinking_s"] = round(now, 2)
            else:
                live.text += event.text
        if event.n_tokens and event.kind not in ("loading", "prefill"):
            self._numbers(event)
        live.revision += 1

    def _first(self, now: float) -> None:
        if "first_token_ms" not in self._live.stats:
            self._live.stats["first_token_ms"] = round(1000 * now, 1)
            read = self._live.stats.get("prefilled", 0) - (self._reused or 0)
            if read and now:
                self._live.stats["prefill_tokens_per_second"] = round(read / now, 2)

    def _numbers(self, event: Event) -> None:
        counters: Counters = event.counters
        self._live.stats |= {"tokens": event.n_tokens, "tokens_per_second": round(event.tokens_per_second, 2),
                             "seconds": round(time.monotonic() - self._start, 2)}
        if event.lossy:
            self._live.stats["lossy"] = preset_of(event.lossy)
        if "server" not in self._live.stats:  # it has no near memory
            self._live.stats |= {
                "hit_rate": round(counters.hit_rate, 4),
                "far_bytes_per_token": (counters.far_bytes + counters.speculative_bytes) // max(1, event.n_tokens)}


class _Saver:
    """Writes the live answer to the database every CHECKPOINT_SECONDS, and at the end without fail.

    In a thread of its own: the engine may pause long between two tokens, and a slow disk must not hold it up.
    """

    def __init__(self, jobs: Jobs, live: Live):
        self._jobs, self._live = jobs, live
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._checkpoints, name="checkpoints", daemon=True)
        self._thread.start()

    def _checkpoints(self) -> None:
        saved = 0
        while not self._ended.wait(CHECKPOINT_SECONDS):
            if (revision := self._live.revision) != saved and self._save("running") is None:
                saved = revision

    def finish(self, status: str) -> None:
        """Save the end; while the disk is full, wait for room (the text stays in memory and on the page)."""
        self._ended.set()
        self._thread.join()
        while (error := self._save(status)) and waits_for_room(error) and not self._jobs._closed:
            time.sleep(PAUSE_SECONDS)

    def _save(self, status: str) -> BaseException | None:
        """What kept it from being saved, which has been said."""
        live = self._live
        try:
            self._jobs.chats.save(live.message_id, text=live.text, thinking=live.thinking, status=status,
                                  stats=dict(live.stats))
        except BaseException as error:
            self._jobs._trouble(error)
            return error
        if self._jobs.disk_trouble:
            self._jobs.disk_trouble = ""
            self._jobs.on_change()
        return None


def _live(answer: Message) -> Live:
    """What goes on stays marked by what its beginning was written under."""
    marks = {name: value for name, value in answer.stats.items() if name == "lossy"}
    return Live(answer.id, answer.conversation_id, text=answer.text, thinking=answer.thinking, stats=marks)
