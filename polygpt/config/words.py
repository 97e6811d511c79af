"""Values as they were typed on a command line: how one is read depends on the type of the field it is for.

`data.path=1e3` names a file, `training.clip_norm=1e3` is a number. So a typed value stays a `Word` until its field is
known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from polygpt.config.yaml import parse_yaml
from polygpt.errors import RequestError

# In YAML `*.txt` is an alias, and `@` and others are reserved: as values of a setting they are text.
_ALWAYS_TEXT = ("*", "&", "@", "%", "`")


class Word(str):
    """A scalar as it was typed.

    Attributes:
        key: the setting it is for.
        unquoted: quotes and escapes of YAML have been resolved already, as within `[a, "b"]`.
    """

    key = ""
    unquoted = False

    def value(self) -> Any:
        """The text read as YAML.

        Raises:
            RequestError: it is not YAML, or a number that is not finite.
        """
        if not self or self.startswith(_ALWAYS_TEXT):
            return str(self) or None
        value = parse_yaml(str(self), self.key)
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{self.key}: a finite number is needed, not {self}")
        return value

    def as_text(self) -> str:
        """The text itself, without the quotes around it."""
        quoted = len(self) > 1 and self[0] in "'\"" and self[-1] == self[0]
        return self.value() if quoted and not self.unquoted else str(self)


class WordList(list):
    """`[a, b]` as it was typed: `text`; its scalars are words."""

    text = ""


class WordMapping(dict):
    """`{key: value}` as it was typed: `text`; its scalars are words."""

    text = ""


def read_word(text: str, key: str) -> Word | WordList | WordMapping:
    """The value `text` of the setting `key`.

    Raises:
        RequestError: a mapping repeats a key.
    """
    if text[:1] in ("[", "{"):
        try:
            return _words(parse_yaml(text, key, scalars=False), key, text)
        except RequestError as error:  # `[1].txt` is no list: it may be a path
            if "duplicate key" in str(error):
                raise
    return _word(text, key)


def _word(text: str, key: str, unquoted: bool = False) -> Word:
    word = Word(text)
    word.key, word.unquoted = key, unquoted
    return word


def _words(tree: Any, key: str, text: str = "") -> Word | WordList | WordMapping:
    if isinstance(tree, dict):
        found = WordMapping({name: _words(value, f"{key}.{name}") for name, value in tree.items()})
    elif isinstance(tree, list):
        found = WordList(_words(value, f"{key}.{index}") for index, value in enumerate(tree))
    else:
        return _word(tree or "", key, unquoted=True)
    found.text = text
    return found


def as_yaml(value: Any) -> Any:
    """`value` with every word in it read as YAML."""
    if isinstance(value, Word):
        return value.value()
    if isinstance(value, Mapping):
        return {name: as_yaml(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [as_yaml(inner) for inner in value]
    return value
