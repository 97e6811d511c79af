"""Speculation: tokens are drafted, and the model checks several in one pass.

The random key of a token is a function of (seed, position) alone, so a draft token is accepted exactly if it is the
token that would have been sampled: the text is that without speculation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from polygpt.errors import RequestError
from polygpt.generation.states import cuttable
from polygpt.model import Model, Params

# Tokens that are drafted at once.
DRAFTED = 7
# Prompt look-up follows the last occurrence of as many of the sequence's last tokens as it finds, of these numbers.
NGRAMS = (4, 3, 2)
# After drafts of which none was right look-up pauses for so many steps, twice as many each time, up to the second.
PAUSE, LONGEST_PAUSE = 1, 64


@dataclass(frozen=True)
class Draft:
    """A smaller model that drafts what the model will sample; it must have the same tokenizer."""

    model: Model
    params: Params


Speculation = Literal["lookup"] | Draft


def check_rewindable(model: Model, length: int, role: str) -> None:
    """Refuses a model whose decoding state cannot go back to before a rejected draft token.

    Raises:
        RequestError: some layer keeps a ring, a recurrence or a pool.
    """
    states = model.init_state(1, length)
    for layer, state in zip(model.config.layers, states, strict=False):
        kinds = (("attention", layer.attention.kind), ("feedforward", layer.feedforward.kind))
        for (slot, kind), part in zip(kinds, state, strict=True):
            if not all(cuttable(part, length)):
                raise RequestError(
                    f"speculation is not possible: {slot} {kind} of {role} keeps a state that cannot go back to before "
                    "a rejected draft token; leave draft out"
                )


class Lookup:
    """Drafts the tokens that followed the same few tokens earlier in the sequence (prompt look-up)."""

    def __init__(self, prompt: Sequence[int], length: int):
        self._tokens = np.zeros(length, np.int32)
        self._count = 0
        self._pause, self._next_pause = 0, PAUSE
        self.extend(prompt)

    @property
    def pause(self) -> int:
        """Steps before the next draft."""
        return self._pause

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes new tokens of the sequence."""
        self._tokens[self._count : self._count + len(tokens)] = tokens
        self._count += len(tokens)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens; none where the last tokens have not occurred before."""
        data = self._tokens[: self._count].tobytes()
        for size in NGRAMS:
            if self._count <= size:
                continue
            tail, end = data[-4 * size :], len(data) - 4
            while (at := data.rfind(tail, 0, end)) >= 0 and at % 4:
                end = at + len(tail) - 1
            if at >= 0:
                start = at // 4 + size
                # Where fewer than `most` have followed, the sequence repeats itself: so does the draft.
                return self._tokens[start + np.arange(most) % (self._count - start)].tolist()
        return []

    def judge(self, drafted: int, right: int, steps: int) -> None:
        """Learns from how many draft tokens were accepted; of none, from how many `steps` have passed."""
        if not drafted:
            self._pause = max(self._pause - steps, 0)
        elif right:
            self._pause, self._next_pause = 0, PAUSE
        else:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, LONGEST_PAUSE)


class DraftTokens(NamedTuple):
    """Draft tokens for the next positions.

    Attributes:
        tokens: ids; None if there are none at all.
        counts: how many of them count in each row.
    """

    tokens: Int[np.ndarray, "B K"] | None
    counts: Int[np.ndarray, "B"]


def draft_by_lookup(rows: Sequence[Lookup | None], rooms: Sequence[int]) -> DraftTokens:
    """The drafts of all rows that do not pause, at most as many as there is room for."""
    tokens, counts = np.zeros((len(rows), DRAFTED), np.int32), np.zeros(len(rows), np.int32)
    for row, (lookup, room) in enumerate(zip(rows, rooms, strict=True)):
        if lookup is not None and not lookup.pause and room > 0:
            found = lookup.draft(min(room, DRAFTED))
            tokens[row, : len(found)], counts[row] = found, len(found)
    return DraftTokens(tokens, counts)


def check_draft(model: Model, draft: Speculation, length: int, vocab_size: int) -> None:
    """Refuses speculation that is not possible.

    Raises:
        RequestError: a state cannot go back, or the draft model does not fit the model.
    """
    check_rewindable(model, length, "the model")
    if not isinstance(draft, Draft):
        if draft != "lookup":
            raise RequestError(f"draft must be 'lookup' or a model, not {draft!r:.40}")
        return
    check_rewindable(draft.model, length, "the draft")
    if draft.model.longest_sequence < length:
        raise RequestError(f"the draft's context has {draft.model.longest_sequence} tokens; {length} are needed")
    ids = draft.model.config.vocab_size
    if ids < vocab_size:
        raise RequestError(f"the draft has {ids} ids, the model {vocab_size}: it must have the same tokenizer")
