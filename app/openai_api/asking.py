"""One request on its way: a thread waits for its turn, asks the engine and hands the events to the event loop."""
from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass

from app.chat.line import Late, Line
from app.openai_api import errors
from app.openai_api.errors import ApiError
from app.openai_api.orders import Order
from app.openai_api.served import Served
from engine import Event, MachineError, Stopped, UserError

PATIENCE_SECONDS = 300.0  # that a request may wait for its turn, where its client does not say how long it will
MOST_WAITING, MOST_OF_A_KEY = 32, 8


@dataclass(frozen=True)
class Begun:
    """The turn has come: which model answers, and how many tokens it is given."""

    model: str
    prompt_tokens: int


class Asking:
    """Made on the event loop. `stop` ends it within a token, from any thread; on_end is called from the thread."""

    def __init__(self, served: Served, line: Line, order: Order, patience: float, on_end: Callable[[Asking], None]):
        self.stop = threading.Event()
        self._served, self._line, self._order, self._on_end = served, line, order, on_end
        self._deadline = time.monotonic() + patience
        self._loop, self._items = asyncio.get_running_loop(), asyncio.Queue()

    def start(self) -> None:
        threading.Thread(target=self._run, name="request", daemon=True).start()

    async def begun(self) -> Begun:
        """Once its turn has come. ApiError when it does not, or the request cannot be served."""
        return self._good(await self._items.get())

    async def events(self) -> AsyncIterator[Event]:
        """Up to and with the end. ApiError where the answer fails."""
        while (item := self._good(await self._items.get())) is not None:
            yield item

    def leave(self) -> None:
        """Whoever asked has gone."""
        self.stop.set()
        self._items.put_nowait(ApiError(499, "The client has gone."))

    def _good(self, item):
        if isinstance(item, ApiError):
            raise item
        return item

    def _hand(self, item) -> None:
        with suppress(RuntimeError):  # the program ends
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def _run(self) -> None:
        try:
            self._served.check(self._order.model)
            seconds = self._served.expected(self._order.model, self._order.characters, self._order.sampling.max_tokens)
            with self._line.turn(self._deadline, self.stop.is_set, seconds=seconds):
                self._ask()
            self._hand(None)
        except Late:
            self._hand(ApiError(503, "The engine was busy with other answers for as long as this request could wait; "
                                     "try again later.", "busy"))
        except Stopped:
            self._hand(ApiError(503, "The answer was stopped.", "stopped"))
        except BaseException as error:
            self._hand(errors.of(error))
        finally:
            self._on_end(self)

    def _ask(self) -> None:
        order = self._order
        engine = self._served.engine(order.model, self.stop, self._deadline)
        if order.wishes.get("tools") and not order.forced and "tools" not in engine.info["wishes"]:
            raise ApiError(400, "This model's chat template knows no tools; force a call with tool_choice, or take "
                                "another model.", param="tools")
        n_prompt = engine.count_tokens(order.prompt, order.wishes, self.stop.is_set)
        if n_prompt >= engine.info["context"]:
            raise ApiError(400, f"This request has {n_prompt:,} tokens, and the context holds "
                                f"{engine.info['context']:,} with the answer; send less.", "context_length_exceeded",
                           "messages")
        with self._line.letting_over() if engine.gives_way else nullcontext():
            self._answer(engine, n_prompt)

    def _answer(self, engine, n_prompt: int) -> None:
        order = self._order
        answer = engine.chat(order.prompt, order.sampling, order.wishes, self.stop, order.request)
        self._hand(Begun(order.model, n_prompt))
        for event in answer:
            if event.kind == "end" and event.reason in ("error", "stopped"):
                raise _why(event, answer.error, self.stop.is_set())
            self._hand(event)


def _why(end: Event, error: BaseException | None, wanted: bool) -> BaseException:
    if end.reason == "stopped":
        return Stopped() if wanted else ApiError(503, "The model was closed while it answered.", "stopped")
    return (UserError if isinstance(error, UserError) else MachineError)(end.text)


class Requests:
    """All that are under way, by key."""

    def __init__(self):
        self._lock = threading.Lock()
        self._under_way: dict[Asking, str] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, served: Served, line: Line, order: Order, patience: float) -> Asking:
        """ApiError where too many wait already."""
        asking, key_id = Asking(served, line, order, patience, self._end), order.request.owner
        with self._lock:
            if sum(each == key_id for each in self._under_way.values()) >= MOST_OF_A_KEY:
                raise ApiError(429, f"{MOST_OF_A_KEY} requests of this key are under way already; wait for one.")
            if len(self._under_way) >= MOST_WAITING:
                raise ApiError(429, f"{MOST_WAITING} requests are under way already; try again later.")
            self._under_way[asking] = key_id
        asking.start()
        return asking

    def stop(self, key_id: str) -> None:
        """All of a key that was revoked."""
        with self._lock:
            for asking, owner in self._under_way.items():
                if owner == key_id:
                    asking.stop.set()

    def _end(self, asking: Asking) -> None:
        with self._lock:
            del self._under_way[asking]
