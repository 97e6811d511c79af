"""The settings of a server: where it listens, how much it takes on, and how long it waits."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from polygpt.config import Config
from polygpt.errors import RequestError

Seconds = Annotated[float, Field(gt=0)]


class ServerSettings(Config):
    """Where the server listens, and its limits.

    Attributes:
        host: the address to bind to. One that is not loopback needs API keys.
        port: the port; 0 takes a free one.
        slots: sequences that each model decodes together.
        queue: sequences of each model that may wait for a slot; more are refused with 429.
        length: tokens of a sequence at most, prompt included; None is the model's context.
        cache_bytes: of each model's cache of prompt beginnings.
        origins: origins whose pages may call the API (CORS), such as `https://example.org`.
        body_limit: bytes of a request's body.
        max_connections: open connections; further ones are closed at once.
        max_n: choices for each prompt, and `best_of`.
        max_prompts: prompts of one request.
        max_stops: stop strings of one request.
        max_beams: beams of one request.
        json_depth: how deep arrays and objects of a body may be nested.
        header_seconds: to the end of the headers, from the first byte of a request or from the connection being made.
        body_seconds: for the body.
        idle_seconds: how long a connection may stay without a request, or with a client that reads nothing.
        constraint_seconds: to compile a request's constraint, the wait for those of other requests included.
        deadline_seconds: from a request's arrival to the end of its answer.
        comment_seconds: a stream that has nothing to send for this long sends a comment, so that proxies keep it open.
        shutdown_seconds: what running requests are given after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    slots: PositiveInt = 8
    queue: NonNegativeInt = 64
    length: PositiveInt | None = None
    cache_bytes: NonNegativeInt = 2**28
    origins: Annotated[tuple[str, ...], Field(strict=False)] = ()
    body_limit: PositiveInt = 2**22
    max_connections: PositiveInt = 1024
    max_n: PositiveInt = 16
    max_prompts: PositiveInt = 64
    max_stops: PositiveInt = 16
    max_beams: PositiveInt = 16
    json_depth: PositiveInt = 64
    header_seconds: Seconds = 10.0
    body_seconds: Seconds = 30.0
    idle_seconds: Seconds = 60.0
    constraint_seconds: Seconds = 10.0
    deadline_seconds: Seconds = 600.0
    comment_seconds: Seconds = 10.0
    shutdown_seconds: Annotated[float, Field(ge=0)] = 30.0

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self, keys: tuple[str, ...]) -> None:
        """Refuses to serve others without a key.

        Raises:
            RequestError: the address is not loopback and there are no keys.
        """
        if not self.is_local and not keys:
            raise RequestError(
                f"--host {self.host} can be reached from other machines, and no API key is set: give --api-key-file "
                "FILE with one key a line, or bind to 127.0.0.1"
            )
