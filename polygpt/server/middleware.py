"""Middleware around every route: counting and logging, keys, body limits, security headers. Pure ASGI."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Sequence
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polygpt.server.errors import ApiError, as_api_error, unavailable
from polygpt.server.logs import access
from polygpt.server.state import Facts, ServerState
from polygpt.server.streaming import Disconnected

# What a page of this server may load: only from here, no inline code, within no other page's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
CLIENT_GONE = 499  # nginx's number for a request whose client did not wait for the answer
# A body that is too large is read and dropped up to this many times the limit, so that its sender sees the answer.
_DRAINED = 16


class Observe:
    """Counts and logs every request, and turns unexpected exceptions into a plain 500."""

    def __init__(self, app: ASGIApp, state: ServerState, routes: Sequence[str]):
        self.app, self.state, self.routes = app, state, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, told = time.perf_counter(), {"status": 0, "bytes": 0}
        facts = scope["polygpt.facts"] = Facts()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                told["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
            elif message["type"] == "http.response.body":
                told["bytes"] += len(message.get("body", b""))
            await send(message)

        self.state.active += 1
        try:
            await self.app(scope, receive, sending)
        except (Disconnected, ClientDisconnect):
            facts.outcome = "disconnected"
            told["status"] = told["status"] or CLIENT_GONE
        except Exception as error:
            facts.outcome, answer = "failed", as_api_error(error)
            if not told["status"]:
                await _refuse(answer, scope, receive, sending)
        finally:
            self.state.active -= 1
            self._tell(scope, facts, told, time.perf_counter() - began)

    def _tell(self, scope: Scope, facts: Facts, told: dict[str, int], seconds: float) -> None:
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        self.state.metrics.requests.labels(self._route(scope["path"]), method, told["status"]).inc()
        client = scope.get("client")
        line = {
            "client": client[0] if client else None,
            "method": scope["method"][:20],
            "path": scope["path"][:200],
            **told,
            "seconds": round(seconds, 6),
            **{name: value for name, value in vars(facts).items() if value is not None},
        }
        access(line)

    def _route(self, path: str) -> str:
        """The path as the counters name it: clients must not be able to make up new ones."""
        if path in self.routes:
            return path
        beginning = next((name for name in ("/static", "/v1/models") if path.startswith(f"{name}/")), None)
        return beginning or "other"


class Guard:
    """Asks for a key, refuses names that a page elsewhere could have pointed here, and requests while shutting down."""

    def __init__(self, app: ASGIApp, state: ServerState, keys: Sequence[str]):
        self.app, self.state = app, state
        self.digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        try:
            if scope["path"] != "/health":
                self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        if self.digests:
            self._check_key(path, headers.get("authorization", ""))
        elif not _is_address(headers.get("host", "")):
            message = "without an API key this server answers to an IP address or localhost, not to other host names"
            raise ApiError(403, message, code="host_not_allowed")
        if self.state.draining and path != "/metrics":
            error = unavailable("the server is shutting down", "shutting_down")
            error.headers["connection"] = "close"
            raise error

    def _check_key(self, path: str, header: str) -> None:
        given = _digest(_key_in(header))
        # Every key is compared, in constant time, so that the time tells nothing.
        same = [hmac.compare_digest(given, digest) for digest in self.digests]
        if not any(same):
            page = path == "/" or path.startswith("/static/")
            scheme = 'Basic realm="polygpt", charset="UTF-8"' if page else "Bearer"
            message = "the API key is wrong" if header else "this server needs an API key: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": scheme})


class BodyLimit:
    """Bounds the size of a request's body and the time that it takes."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float):
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size, more, ends = 0, True, asyncio.get_running_loop().time() + self.seconds

        async def receiving() -> Message:
            nonlocal size, more
            if not more:
                return await receive()
            try:
                async with asyncio.timeout_at(ends):
                    message = await receive()
            except TimeoutError:
                message = f"the body did not arrive within {self.seconds:g} seconds"
                raise ApiError(408, message, headers={"connection": "close"}) from None
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size > self.limit:
                await self._drain(receive, size if more else None, ends)
                raise self._too_large()
            return message

        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self.limit:
            await self._drain(receive, 0, ends)
            await _refuse(self._too_large(), scope, receive, send)
            return
        await self.app(scope, receiving, send)

    def _too_large(self) -> ApiError:
        message = f"the body exceeds this server's limit of {self.limit:,} bytes"
        return ApiError(413, message, code="body_too_large", headers={"connection": "close"})

    async def _drain(self, receive: Receive, size: int | None, ends: float) -> None:
        """Drains the body for a while: closing the connection early may reset it before the client reads the answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(ends):
                while size is not None and size < _DRAINED * self.limit:
                    message = await receive()
                    size = size + len(message.get("body", b"")) if message.get("more_body") else None


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)


def _digest(key: str) -> bytes:
    """A digest of one length for all keys, so that comparing does not reveal the length of the right one."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key_in(header: str) -> str:
    """The key in an Authorization header: Bearer, or the password of Basic, which browsers ask for."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        with suppress(binascii.Error, UnicodeDecodeError):
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
    return ""


def _is_address(host: str) -> bool:
    """Whether a Host header is an address or localhost: a name could be one that its owner points to this machine."""
    name = host.partition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
    if name.lower().rstrip(".") == "localhost":
        return True
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False
