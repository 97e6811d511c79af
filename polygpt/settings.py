"""A foreign configuration, read key by key, so that a setting which nothing reads is an error and not a surprise."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from polygpt.errors import RequestError

T = TypeVar("T", int, float, bool, str)
_MISSING: Any = object()
LIMIT = 1 << 24  # bytes of a configuration file
_LARGEST = (1 << 31) - 1


class Settings:
    """The keys of one JSON object. `finish` refuses keys that were neither read nor ignored.

    Null counts as absent, as it does in the libraries that write these files.
    """

    def __init__(self, values: Mapping[str, Any], where: str, under: str = ""):
        self.values, self.where, self.under = dict(values), where, under
        self.seen: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The plain value."""
        self.seen.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def take(self, name: str, kind: type[T], default: Any = _MISSING) -> T:
        """The value, of type `kind`; an integer is accepted for a float.

        Raises:
            RequestError: it is missing and has no default, or is of another type.
        """
        value = self.get(name, default)
        if value is _MISSING:
            raise self.error(f"the setting '{name}' is missing")
        if value is default:
            return value
        if type(value) is int and abs(value) > _LARGEST:
            raise self.error(f"'{name}' is larger than {_LARGEST:,}")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise self.error(f"'{name}' is {value!r}, where {_KINDS[kind]} is needed")
        return value

    def set_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Adds keys that are absent; one that is null stays null."""
        self.values = {**defaults, **self.values}

    def require(self, name: str, expected: Any, why: str) -> None:
        """Refuses any value but `expected` or null.

        Raises:
            RequestError: it has another value; `why` says why that is refused.
        """
        value = self.get(name, expected)
        if value != expected:
            raise self.error(f"'{name}' is {value!r}; {why}")

    def part(self, name: str) -> Settings | None:
        """The object below `name`, if there is one."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(f"'{name}' is {value!r}, where an object is needed")
        return Settings(value, self.where, f"{self.under}{name}.")

    def ignore(self, *names: str) -> None:
        """Marks keys that do not change what the model computes."""
        self.seen.update(names)

    def finish(self) -> None:
        """Refuses settings that were neither read nor ignored.

        Raises:
            RequestError: there is one; it is named.
        """
        for name in self.values.keys() - self.seen:
            if self.values[name] is not None:
                raise self.error(f"the setting '{name}' ({self.values[name]!r}) is not known for this architecture")

    def error(self, text: str) -> RequestError:
        return RequestError(f"{self.where}: {text.replace(chr(39), chr(39) + self.under, 1)}")


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; duplicate keys, NaN and infinities are refused.

    Raises:
        RequestError: it cannot be read, is too large, or is not such an object.
    """
    try:
        if path.stat().st_size > LIMIT:
            raise RequestError(
                f"{path}: {path.stat().st_size:,} bytes exceed the limit of {LIMIT:,} for a configuration"
            )
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=_refuse_constant, parse_float=_finite)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object without duplicate keys.

    Raises:
        ValueError: a key is duplicated; it is named.
    """
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"duplicate key {key!r}")
        values[key] = value
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
