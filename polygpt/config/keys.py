"""Which keys there are and what they take, as plain data: mistakes are refused without importing JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from polygpt.config.fields import nested, slot_of
from polygpt.config.types import type_of, wrong_values
from polygpt.errors import RequestError, suggest

Keys = dict[str, Any]
# Mistakes that one error tells; the rest are counted.
MOST_TOLD = 3
_ABBREVIATIONS = {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size", "max_steps": "steps"}


def known_keys(cls: type[BaseModel]) -> Keys:
    """The keys of `cls`, each with what may be below it, ready for JSON.

    A configuration is `{"keys": ...}`, a slot `{"kinds": {kind: keys}, "default": kind}`, a plain field `{"type": ...}`
    (see `type_of`), or None if its type is not described.
    """
    keys: Keys = {}
    for name, field in cls.model_fields.items():
        slot, inner = slot_of(field), nested(field)
        if slot is not None:
            kinds = {kind: known_keys(part) for kind, part in slot.registry.items()}
            keys[name] = {"kinds": kinds, "default": slot.default}
        else:
            keys[name] = {"keys": known_keys(inner)} if inner is not None else _plain(field)
    return keys


def _plain(field: FieldInfo) -> Keys | None:
    described = type_of(field)
    return None if described is None else {"type": described}


def check_keys(keys: Keys, data: Mapping[str, Any], where: str = "") -> None:
    """Refuses a key or a kind in `data` that `keys` does not know, or a value of another type.

    What depends on several values is left to `validate`.

    Raises:
        RequestError: the first mistakes, each with its path and what would be right.
    """
    refuse(list(mistakes(keys, data).values()), where)


def mistakes(keys: Keys, data: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with `data`, by dotted path: keys and kinds that are not in `keys`, values of another type."""
    return _mistakes(keys, data, "", {})


def refuse(problems: list[str], where: str = "") -> None:
    """Raises a RequestError of the first `MOST_TOLD` problems, if there are any."""
    if problems:
        more = f" (and {len(problems) - MOST_TOLD} more)" if len(problems) > MOST_TOLD else ""
        prefix = f"{where}: " if where else ""
        raise RequestError("\n".join(prefix + problem for problem in problems[:MOST_TOLD]) + more)


def no_such_key(path: str, keys: Keys) -> str:
    """Says that the last step of `path` is none of `keys`, and names the nearest, or the same key one level deeper."""
    key = path.rpartition(".")[2]
    meant = _ABBREVIATIONS.get(key, key)
    if meant != key and meant in keys:
        return f"{path}: no such key; did you mean '{meant}'?"
    deeper = [name for name, below in keys.items() if below and any(meant in inner for inner in _inner(below))]
    return f"{path}: no such key; " + (f"did you mean '{deeper[0]}.{meant}'?" if deeper else suggest(key, keys))


def _inner(below: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The keys one level deeper: of a configuration, or of each kind that a slot may have."""
    return [below.get("keys", {}), *below.get("kinds", {}).values()]


def no_such_kind(kind: str, kinds: Mapping[str, Any]) -> str:
    """Says that there is no part `kind`, and names the nearest."""
    own = " (a part of your own is named module:Class)" if "." in kind else ""
    return f"no kind '{kind}'; {suggest(kind, kinds)}{own}"


def _mistakes(keys: Keys, data: Mapping[str, Any], at: str, beside: Mapping[str, Any]) -> dict[str, str]:
    """The problems below the path `at`. A part in a list that names no kind takes that of its namesake in `beside`."""
    problems = {}
    for name, value in data.items():
        path = f"{at}{name}"
        if name not in keys:
            problems[path] = no_such_key(path, keys)
            continue
        below = keys[name] or {}
        if "type" in below:
            problems |= wrong_values(below["type"], value, path)
            continue
        for step, entry in _each(value):
            if "keys" in below and isinstance(entry, Mapping):
                problems |= _mistakes(below["keys"], entry, f"{path}{step}.", data if step else {})
            elif "kinds" in below:
                problems |= _mistakes_in_part(below, entry, f"{path}{step}", beside.get(name))
    return problems


def _mistakes_in_part(slot: dict[str, Any], value: Any, path: str, beside: Any) -> dict[str, str]:
    kind = next(filter(None, (_kind(value), _kind(beside), slot["default"])), None)
    if kind is None or ":" in kind:  # a mistake of another sort, or a part of the user's own
        return {}
    if kind not in slot["kinds"]:
        return {path: f"{path}: {no_such_kind(kind, slot['kinds'])}"}
    return _mistakes(slot["kinds"][kind], value, f"{path}.", {}) if isinstance(value, Mapping) else {}


def _kind(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, Mapping) else value
    return str(kind) if isinstance(kind, str) else None


def _each(value: Any) -> list[tuple[str, Any]]:
    """The entries of a list with their steps in a path, or `value` itself."""
    if isinstance(value, (list, tuple)):
        return [(f".{index}", entry) for index, entry in enumerate(value)]
    return [("", value)]
