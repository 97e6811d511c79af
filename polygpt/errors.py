"""The errors that users see: one to three lines that say what is wrong and how to fix it.

`RequestError` is an invalid request (exit code 2): a misspelled key, a missing file, shapes that do not match.
`PolygptError` is a valid request that failed (exit code 1): a full disk, a diverged run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolygptError(Exception):
    """A valid request failed."""

    exit_code = 1


class RequestError(PolygptError):
    """The request is invalid; nothing was compiled, allocated or written."""

    exit_code = 2


class TooLong(RequestError):
    """A text exceeds the context by its length alone; it was not tokenized.

    Attributes:
        tokens: it has at least so many.
    """

    def __init__(self, tokens: int, context: int):
        super().__init__(f"the prompt has at least {tokens} tokens, model.context_length is {context}: shorten it")
        self.tokens = tokens


def suggest(word: str, choices: Iterable[str]) -> str:
    """The fix for a misspelled `word`: the nearest of `choices`, or all of them if none is close."""
    choices = sorted(set(choices))
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return "choose from: " + ", ".join(choices) if choices else "no value is allowed here"
