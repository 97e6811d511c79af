"""Answers while they run: server-sent events, and the watch over a client that may go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import Receive, Scope, Send

from polygpt.server.errors import ApiError
from polygpt.server.jobs import Job
from polygpt.server.runner import Runner

DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"


class Disconnected(Exception):
    """The client went away: nobody is left to be told."""


def event(value: Any) -> bytes:
    """One server-sent event of JSON."""
    return b"data: " + dump(value) + b"\n\n"


def dump(value: Any) -> bytes:
    """JSON as bytes; refuses NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


@contextmanager
def watched(job: Job, runner: Runner, receive: Receive, deadline: float) -> Iterator[None]:
    """While inside, the job ends when its client goes away, or `deadline` seconds after it arrived; on the way out
    at the latest."""
    loop = asyncio.get_running_loop()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        runner.abort(job, Disconnected())

    def expire() -> None:
        message = f"the answer took longer than {deadline:g} seconds and was cut"
        runner.abort(job, ApiError(504, message, code="deadline_exceeded"))

    watcher, timer = loop.create_task(watch()), loop.call_later(deadline, expire)
    try:
        yield
    finally:
        watcher.cancel()
        timer.cancel()
        runner.abort(job, Disconnected())


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
            except ApiError as error:
                await send({"type": "http.response.body", "body": event(error.body()), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
