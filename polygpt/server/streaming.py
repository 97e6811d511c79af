"""Streaming: server-sent events, and watching for clients that disconnect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from polygpt.server.errors import ApiError, as_api_error
from polygpt.server.jobs import Job
from polygpt.server.runner import Runner

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"


class Disconnected(Exception):
    """The client closed the connection; nobody is left to answer."""


def event(value: Any) -> bytes:
    """One server-sent event of JSON."""
    return b"data: " + dump(value) + b"\n\n"


def dump(value: Any) -> bytes:
    """JSON as bytes; refuses NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


@contextmanager
def watched(job: Job, runner: Runner, receive: Receive, deadline: float) -> Iterator[None]:
    """Ends the job if its client disconnects or after `deadline` seconds, and in any case on leaving the block."""
    loop = asyncio.get_running_loop()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        runner.abort(job, Disconnected())

    def expire() -> None:
        runner.abort(job, _expired(deadline))

    watcher, timer = loop.create_task(watch()), loop.call_later(deadline, expire)
    try:
        yield
    finally:
        watcher.cancel()
        timer.cancel()
        runner.abort(job, Disconnected())


async def unless_gone(computing: Coroutine[Any, Any, T], receive: Receive, deadline: float) -> T:
    """What `computing` gives, unless the client goes away or `deadline` seconds pass.

    Raises:
        Disconnected: it went.
        ApiError: they passed.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(computing), asyncio.ensure_future(watch())
    try:
        await asyncio.wait((work, gone), timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise Disconnected if gone.done() else _expired(deadline)
    finally:
        work.cancel()
        gone.cancel()


def _expired(deadline: float) -> ApiError:
    message = f"the answer took longer than {deadline:g} seconds and was cut"
    return ApiError(504, message, code="deadline_exceeded")


class EventStream:
    """A response of server-sent events; an error while it runs becomes its last event."""

    def __init__(self, job: Job, runner: Runner, events: AsyncIterator[bytes], deadline: float):
        self.job, self.runner, self.events, self.deadline = job, runner, events, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        with watched(self.job, self.runner, receive, self.deadline):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async for data in self.events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Disconnected:
                raise
            except Exception as error:
                told = as_api_error(error)
                await send({"type": "http.response.body", "body": event(told.body()), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
