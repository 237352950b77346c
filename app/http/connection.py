"""One connection of a browser, with an end to its patience: anybody on this computer can connect, no link needed.

uvicorn bounds neither how long a client takes to send a request nor how many clients there are.
"""
from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 100  # a browser opens six to one host
HEADER_BYTES = 256 << 10  # cookies of every other program on 127.0.0.1 come along
SECONDS = {h11.IDLE: 10.0, h11.SEND_BODY: 60.0}  # for all of a request's head, and for all of its body


class Connection(H11Protocol):
    _awaited, _patience = None, None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _wait(self) -> None:
        """A new time for each part of a request, not for each of its bytes."""
        if self.conn.their_state is self._awaited:
            return
        self._forget()
        self._awaited = self.conn.their_state
        if self._awaited in SECONDS:
            self._patience = self.loop.call_later(SECONDS[self._awaited], self.transport.abort)

    def _forget(self) -> None:
        if self._patience:
            self._patience.cancel()
