"""A user's text that keeps track of the special tokens typed in it while a chat template works on it.

In each such token one character is replaced by a private one, so that the token is not recognised as special. Tests see
the text as it was typed; what strings are made from it keep the mark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from polygpt.errors import RequestError

_OFFSET = 0x100000  # Unicode's last plane, for private use
_MARKED = re.compile("[\U00100000-\U0010ffff]")


def mark_tokens(text: str, tokens: Iterable[str]) -> str:
    """`text` with the special `tokens` in it marked.

    Raises:
        RequestError: the text holds special tokens and characters that would be taken for marks.
    """
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
    marked = text
    while pattern.search(marked):  # one token may lie within another
        marked = pattern.sub(_mark, marked)
    if marked != text and unmark(marked) != text:
        raise RequestError("the message holds special tokens beside private-use characters; leave one of them out")
    return text if marked == text else _Typed(marked, pattern)


def unmark(text: str) -> str:
    """`text` as it was before `mark_tokens`."""
    return _MARKED.sub(lambda match: chr(ord(match[0]) - _OFFSET), text)


def _mark(match: re.Match[str]) -> str:
    # Best inside the token, where a template is less likely to cut or compare, and without upper and lower case.
    token = match[0]
    at = min(range(len(token)), key=lambda i: (token[i].upper() != token[i].lower(), i in (0, len(token) - 1)))
    return token[:at] + chr(_OFFSET + ord(token[at]) % 0x10000) + token[at + 1 :]


class _Typed(str):
    """Marked text."""

    __slots__ = ("_pattern",)

    def __new__(cls, text: str, pattern: re.Pattern[str]) -> _Typed:
        self = super().__new__(cls, text)
        self._pattern = pattern
        return self

    def __str__(self) -> str:
        return self

    def __hash__(self) -> int:
        return hash(unmark(self))


def _as_typed(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(self: _Typed, *args: Any, **kwargs: Any) -> Any:
        return method(unmark(self), *(unmark(arg) if isinstance(arg, str) else arg for arg in args), **kwargs)

    return call


def _keeping_marks(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def wrap(self: _Typed, value: Any) -> Any:
        if isinstance(value, str):
            return _Typed(value, self._pattern)
        return type(value)(wrap(self, part) for part in value) if isinstance(value, list | tuple) else value

    def call(self: _Typed, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], str) and not isinstance(args[0], _Typed):
            args = (self._pattern.sub(_mark, args[0]), *args[1:])  # what is searched for
        return wrap(self, method(self, *args, **kwargs))

    return call


_TESTS = ("__contains__", "__eq__", "__ne__", "count", "endswith", "find", "index", "rfind", "rindex", "startswith")
_CUTS = ("__getitem__", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rpartition", "rsplit")
_CUTS += ("rstrip", "split", "splitlines", "strip")
_CASES = ("capitalize", "casefold", "expandtabs", "lower", "swapcase", "title", "upper")
for _name in _TESTS:
    setattr(_Typed, _name, _as_typed(_name))
for _name in (*_CUTS, *_CASES):
    setattr(_Typed, _name, _keeping_marks(_name))
