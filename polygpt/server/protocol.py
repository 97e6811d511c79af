"""HTTP connections with limits of time: for the headers of a request, and for clients that read nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from polygpt.server.errors import ApiError
from polygpt.server.settings import ServerSettings


def limited(settings: ServerSettings) -> type[H11Protocol]:
    """uvicorn's protocol with the limits of `settings`."""

    class Limited(H11Protocol):
        """A connection."""

        _heading: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def __init__(self, config: uvicorn.Config, *arguments: Any, **named: Any):
            super().__init__(config, *arguments, **named)
            self.conn = _Connection(h11.SERVER)

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.write(_whole(ApiError(503, "the server has too many connections", code="too_many")))
                transport.close()
            else:
                self._heading = self._later(settings.header_seconds)

        def data_received(self, data: bytes) -> None:
            if self._heading is None and not self._busy:
                self._heading = self._later(settings.header_seconds)
            super().data_received(data)
            if self._busy:
                self._heading = _stopped(self._heading)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self._stalled or self._later(settings.idle_seconds)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stalled = _stopped(self._stalled)

        def connection_lost(self, exc: Exception | None) -> None:
            self._heading, self._stalled = _stopped(self._heading), _stopped(self._stalled)
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self.transport.write(_whole(ApiError(400, "this is not a valid HTTP request")))
            self.transport.close()

        @property
        def _busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _later(self, seconds: float) -> asyncio.TimerHandle:
            return self.loop.call_later(seconds, self.transport.abort)

    return Limited


class _Connection(h11.Connection):
    """h11's side of a connection, with short cuts for the pieces of a chunked body, of which a stream has many."""

    _chunked = False

    def send(self, event: h11.Event) -> bytes | None:
        if type(event) is h11.Data and self._chunked and event.data and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)
        sent = super().send(event)
        if type(event) is h11.Response:
            self._chunked = b"\r\ntransfer-encoding: chunked\r\n" in sent.lower()
        return sent


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _whole(error: ApiError) -> bytes:
    """A response without an application."""
    body = json.dumps(error.body()).encode()
    head = f"HTTP/1.1 {error.status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body
