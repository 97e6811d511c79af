"""Serving on a socket until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.applications import Starlette

from polygpt.errors import PolygptError
from polygpt.server.app import create_app
from polygpt.server.errors import unavailable
from polygpt.server.logs import log_to_stderr
from polygpt.server.protocol import limited
from polygpt.server.served import Served
from polygpt.server.settings import ServerSettings
from polygpt.server.state import ServerState

# Seconds that connections are given to close once their requests have ended.
_CLOSING = 3


def listen(settings: ServerSettings) -> socket.socket:
    """The socket that the server will accept connections from.

    Raises:
        PolygptError: the address cannot be bound to.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise PolygptError(f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}") from None
    return found


def address_of(listening: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    models: Sequence[Served],
    settings: ServerSettings,
    keys: Sequence[str],
    listening: socket.socket,
    on_start: Callable[[], None] = lambda: None,
) -> int:
    """Serves until SIGTERM or SIGINT; returns the signal.

    Requests that run then are finished, or cut after `settings.shutdown_seconds`; new ones are refused. A second
    signal cuts at once.
    """
    log_to_stderr()
    app = create_app(models, settings, keys)
    server = _Server(uvicorn_config(app, settings), app.state.server, on_start)
    server.run([listening])
    return server.signal


def uvicorn_config(app: Starlette, settings: ServerSettings) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http=limited(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=max(int(settings.idle_seconds), 1),
        timeout_graceful_shutdown=_CLOSING,
    )


class _Server(uvicorn.Server):
    """Shuts down in two steps: first it refuses requests and waits for running ones, then it closes the socket."""

    def __init__(self, config: uvicorn.Config, state: ServerState, on_start: Callable[[], None]):
        super().__init__(config)
        self.state, self.on_start, self.signal = state, on_start, 0
        self._stopping: asyncio.Task | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts, then calls `on_start`."""
        await super().startup(sockets)
        self.on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles the signals within the event loop, so that no code is interrupted."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _stop(self, number: int) -> None:
        if self._stopping is None:
            self.signal, self.state.draining = number, True
            self._stopping = asyncio.get_running_loop().create_task(self._drain())
        else:
            self._cut()

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.state.settings.shutdown_seconds):
                while self.state.active and not self.should_exit:
                    await asyncio.sleep(0.05)
        self._cut()

    def _cut(self) -> None:
        for served in self.state.models.values():
            served.runner.abort_all(unavailable("the server is shutting down", "shutting_down"))
        self.should_exit = True
