"""Settings laid over a configuration: `key=value` words, dotted keys, nested mappings."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from polygpt.config.words import read_word
from polygpt.errors import RequestError


class Fields(dict):
    """Fields given one by one (`attention.kind=local attention.window=16`), not as a whole mapping.

    Attributes:
        before: the fields of the part whose `kind` they change; its successor keeps those that are its own as well.
    """

    before: Mapping[str, Any] | None = None


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words of a command line as dotted keys; `validate` reads each value by its field's type.

    Raises:
        RequestError: a word has no `=`, or a key comes twice.
    """
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise RequestError(f"'{word}': settings are written key=value, such as training.steps=200")
        if key in changes:
            first = getattr(changes[key], "text", changes[key])
            raise RequestError(f"{key}: given twice ('{first}' and '{text}'); keep one")
        changes[key] = read_word(text, key)
    return changes


def dotted_to_nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`; a key within a mapping that is given too is laid over it.

    Raises:
        RequestError: a plain value is given where a key goes deeper.
    """
    nested = Fields()
    for key, value in sorted(changes.items(), key=lambda item: item[0].count(".")):
        *parents, last = key.split(".")
        place = nested
        for depth, step in enumerate(parents, start=1):
            place = place.setdefault(step, Fields())
            if not isinstance(place, dict):
                raise RequestError(_clash(".".join(parents[:depth]), place, ".".join([*parents[depth:], last]), value))
        place[last] = copy.copy(value) if isinstance(value, Mapping) else value
    return nested


def _clash(key: str, plain: Any, rest: str, value: Any) -> str:
    """Says that `key` cannot be `plain` and have something below it."""
    problem = f"{key}={plain} and {key}.{rest}={value} do not go together"
    if rest == "kind":
        return f"{problem}; both name the kind: keep one of the two"
    if isinstance(plain, str) and plain and "." not in rest:
        return f"{problem}; write {key}={{kind: {plain}, {rest}: {value}}}"
    return f"{problem}; keep one of the two"


def merge(base: Any, changes: Any) -> Any:
    """`changes` laid over `base`: mappings merge key by key, anything else is replaced.

    A mapping that names another `kind` than the base replaces it whole: the fields of one kind say nothing about
    another's. Given field by field (`Fields`), it remembers the base. A base that is a kind's name alone stands for
    `{kind: name}`. An entry of a list is reached by its number (`pattern.0.feedforward.num_experts`).
    """
    if isinstance(base, list) and isinstance(changes, Mapping) and changes and all(k.isdigit() for k in changes):
        known = {str(i): entry for i, entry in enumerate(base)}
        if beyond := [key for key in changes if key not in known]:
            raise RequestError(f"there is no entry {beyond[0]}: the list has {len(base)}, the first is 0")
        return [merge(entry, changes[i]) if i in changes else entry for i, entry in known.items()]
    if isinstance(base, str) and isinstance(changes, Mapping):
        base = {"kind": base}
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return changes
    if "kind" in base and changes.get("kind", base["kind"]) != base["kind"]:
        if not isinstance(changes, Fields):
            return dict(changes)
        replaced = Fields(changes)
        replaced.before = merge(base, changes.before) if changes.before else base
        return replaced
    return {**base, **{key: merge(base.get(key), value) for key, value in changes.items()}}
