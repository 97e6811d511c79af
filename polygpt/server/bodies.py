"""Request bodies: bytes to JSON to a schema. Whatever the bytes are, the answer is a value or a 4xx error."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, TypeVar

from starlette.requests import Request

from polygpt.config import Config, validate
from polygpt.errors import RequestError
from polygpt.server.errors import ApiError, invalid
from polygpt.server.schemas import Sampled

C = TypeVar("C", bound=Config)
# Possessive, and the closing quote may be missing: a match cannot fail once it has begun, so the time is linear.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_LARGEST = 2**63
# Bytes of a body from which on reading it would keep the event loop from its other clients.
_LONG = 2**16
# Characters of a message at most; what a client sent may be quoted in it.
_LONGEST_MESSAGE = 1000


def parse_json(data: bytes, depth: int) -> Any:
    """The JSON value in `data`.

    Duplicate keys, NaN, infinities (also those that 1e999 overflows to), integers beyond 64 bits and half surrogates
    are refused, and so is nesting deeper than `depth`.

    Raises:
        ApiError: 400.
    """
    if _nesting(data) > depth:
        raise invalid(f"the body's arrays and objects are nested deeper than {depth}", code="invalid_json")
    try:
        text = data.decode()
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
        )
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if "\\u" in text and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise invalid("the body holds half of a surrogate pair, which is no text", code="invalid_json")
    return value


def check_fields(cls: type[C], value: Any) -> C:
    """The body as a `cls`; null counts as absent.

    Raises:
        ApiError: 400, with the field in `param`.
    """
    if not isinstance(value, dict):
        raise invalid(f"the body must be a JSON object, not {_kind(value)}", code="invalid_json")
    value = cls.without_ignored(value) if issubclass(cls, Sampled) else value
    given = {name: field for name, field in value.items() if field is not None}
    try:
        return validate(cls, given)
    except RequestError as error:
        message = str(error)[:_LONGEST_MESSAGE]
        name = re.split(r"[:.]", message, maxsplit=1)[0]
        param = name if name in given or name in cls.model_fields else None
        raise invalid(message, param=param) from None


async def read_body(request: Request, cls: type[C], depth: int) -> C:
    """The request's body as a `cls`.

    Raises:
        ApiError: 400 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps out the forms of other origins' pages, which need no CORS
        raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json")
    data = await request.body()
    if len(data) < _LONG:
        return _read(cls, data, depth)
    return await asyncio.to_thread(_read, cls, data, depth)


def _read(cls: type[C], data: bytes, depth: int) -> C:
    return check_fields(cls, parse_json(data, depth))


def _nesting(data: bytes) -> int:
    """How deep the brackets outside of strings are nested."""
    deepest = depth = 0
    for byte in re.sub(rb"[^][{}]+", b"", _STRING.sub(b"", data)):
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"duplicate key {twice!r:.60}")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -_LARGEST <= int(text) < _LARGEST:
        raise ValueError(f"the number {text:.40} is too large")
    return int(text)


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return names.get(type(value), "null")
