"""The errors a user meets: one to three lines that name the thing and the mend.

`RequestError` is a request that cannot be right (exit code 2): a misspelled key, a missing file, shapes that
do not fit. `PolygptError` is a right request that failed (exit code 1): a full disk, a diverged run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolygptError(Exception):
    """Something failed while carrying out a request that was itself in order."""

    exit_code = 1


class RequestError(PolygptError):
    """The request is wrong; nothing was compiled, allocated or written for it."""

    exit_code = 2


def suggest(word: str, choices: Iterable[str]) -> str:
    """The mend for a misspelled `word`: the nearest of `choices`, or all of them where none is near."""
    choices = sorted(set(choices))
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return "choose from: " + ", ".join(choices) if choices else "nothing can stand here"
