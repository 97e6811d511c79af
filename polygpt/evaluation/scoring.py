"""Log-likelihoods of tokens given those before them, in batches of few shapes.

Knows token ids and a model; nothing of text. `score_rows` computes each row by itself. `score_continuations` gives the
same numbers for less where several continuations follow one context, as in multiple choice: the context is read once.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from polygpt.errors import PolygptError
from polygpt.evaluation.programs import LOGIT_ROWS, Picks, programs_of
from polygpt.evaluation.shapes import (
    compiling_tokens,
    even,
    fitting,
    rounded,
    state_length,
    states_held,
    token_budget,
    widths,
)
from polygpt.model import Model, Params
from polygpt.sharding import whole_rows

# Called with (done, total).
ProgressCallback = Callable[[int, int], None]
Ids = Sequence[int]


class Row(NamedTuple):
    """Input ids, at most the context's length, and what the last `len(targets)` of them are to predict."""

    inputs: Ids
    targets: Ids

    @property
    def context(self) -> Ids:
        """The inputs before the first target."""
        return self.inputs[: len(self.inputs) + 1 - len(self.targets)]


class Score(NamedTuple):
    """Of one row: Σ ln p of its targets, and whether no other token was likelier than any of them."""

    log_likelihood: float
    greedy: bool


# Rows that share a context, by their places in the request.
Group = dict[int, Row]


def no_progress(done: int, total: int) -> None:
    """The callback of a caller that shows no progress."""


def row_of(context: Ids, continuation: Ids, length: int) -> Row:
    """The row that scores `continuation` after `context`, cut from the left to `length` input ids.

    Raises:
        ValueError: one of them is empty, or the continuation alone is longer than `length`.
    """
    if not len(context) or not 0 < len(continuation) <= length:
        raise ValueError(f"{len(context)} ids of context and {len(continuation)} to score do not fit in {length}")
    ids = [*context, *continuation][-(length + 1) :]
    return Row(ids[:-1], continuation)


def score_rows(
    model: Model, params: Params, rows: Sequence[Row], progress: ProgressCallback = no_progress
) -> list[Score]:
    """The score of each row, in their order; each is computed by itself.

    Raises:
        PolygptError: a likelihood is not a number.
    """
    return _collect(_plain_batches(model, params, dict(enumerate(rows))), len(rows), progress)


def score_continuations(
    model: Model, params: Params, pairs: Sequence[tuple[Ids, Ids]], progress: ProgressCallback = no_progress
) -> list[Score]:
    """The score of each (context, continuation), in their order; each cut from the left to the model's context.

    Continuations of the same context are scored from the decoding state after it.

    Raises:
        PolygptError: a likelihood is not a number.
        ValueError: as `row_of`.
    """
    length = model.config.context_length
    rows = [row_of(context, continuation, length) for context, continuation in pairs]
    together: dict[tuple[int, ...], dict[int, Row]] = defaultdict(dict)
    for place, row in enumerate(rows):
        together[tuple(row.context)][place] = row
    several = [group for group in together.values() if len(group) > 1]
    # Padding after a continuation must stay within the positions that the model knows.
    room = rounded(max((len(row.targets) for group in several for row in group.values()), default=0))
    shared = [group for group in several if len(_context_of(group)) + room <= length]
    places = {place for group in shared for place in group}
    alone = {place: row for place, row in enumerate(rows) if place not in places}
    batches = itertools.chain(_shared_batches(model, params, shared), _plain_batches(model, params, alone))
    return _collect(batches, len(rows), progress)


# --- Rows by themselves -------------------------------------------------------------------------------------


def _plain_batches(model: Model, params: Params, rows: Group) -> Iterator[_Pending]:
    """`rows` in batches of like length."""
    programs, longest = programs_of(model.config), model.config.context_length
    chosen = widths((len(row.inputs) for row in rows.values()), compiling_tokens(model))
    members = sorted(rows.items(), key=lambda member: -len(member[1].inputs))
    while members:
        width = min(fitting(chosen, len(members[0][1].inputs)), longest)
        size = whole_rows(even(len(rows), token_budget() // width))
        batch, members = members[:size], members[size:]
        tokens, picks = np.zeros((size, width), np.int32), _Picking()
        for number, (_, row) in enumerate(batch):
            tokens[number, : len(row.inputs)] = row.inputs
            stop = number * width + len(row.inputs)
            picks.add(range(stop - len(row.targets), stop), row.targets)
        yield _Pending(batch, programs.plain(params, tokens, picks.padded(tokens.size)))


# --- Continuations of a shared context ----------------------------------------------------------------------


class _Held(NamedTuple):
    """Contexts that were read: how many ids each has, their last hidden states, and the decoding states after them."""

    lengths: np.ndarray
    last: Any
    state: Any


def _shared_batches(model: Model, params: Params, groups: Sequence[Group]) -> Iterator[_Pending]:
    """Contexts in batches of like length, each followed by its continuations, again in batches of like length."""
    programs, longest = programs_of(model.config), model.config.context_length
    price = compiling_tokens(model)
    chosen = widths((len(_context_of(group)) for group in groups), price)
    ending_widths = widths((len(row.targets) - 1 for group in groups for row in group.values()), price)
    most = max(len(row.inputs) for group in groups for row in group.values()) if groups else 0
    order = sorted(groups, key=lambda group: (-fitting(chosen, len(_context_of(group))), -_targets_of(group)))
    while order:
        width = min(fitting(chosen, len(_context_of(order[0]))), longest)
        size = whole_rows(even(len(groups), min(states_held(model, state_length(most)), token_budget() // 32)))
        batch, order = order[:size], order[size:]
        length = state_length(width + max(len(row.targets) for group in batch for row in group.values()))
        tokens, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
        for number, context in enumerate(map(_context_of, batch)):
            tokens[number, : len(context)], lengths[number] = context, len(context)
        held = _Held(lengths, *programs.contexts(params, tokens, lengths, length))
        yield from _ending_batches(model, params, batch, held, ending_widths)


def _ending_batches(
    model: Model, params: Params, groups: Sequence[Group], held: _Held, chosen: Sequence[int]
) -> Iterator[_Pending]:
    """The continuations of contexts that were read, without their last ids, which predict nothing."""
    programs = programs_of(model.config)
    members = [(number, member) for number, group in enumerate(groups) for member in group.items()]
    members.sort(key=lambda member: -len(member[1][1].targets))
    while members:
        width = fitting(chosen, len(members[0][1][1].targets) - 1)
        size = whole_rows(max(token_budget() // (4 * width), 1))
        batch, members = members[:size], members[size:]
        tokens, counts, owner = np.zeros((size, width), np.int32), np.zeros(size, np.int32), np.zeros(size, np.int32)
        picks = _Picking()
        for number, (context, (_, row)) in enumerate(batch):
            counts[number], owner[number] = len(row.targets) - 1, context
            tokens[number, : counts[number]] = row.targets[:-1]
            # The hidden states are the contexts' last ones, then those of the continuations.
            begin = len(held.lengths) + number * width
            picks.add([context, *range(begin, begin + counts[number])], row.targets)
        before = (held.last, held.state, owner, held.lengths[owner])
        result = programs.endings(params, *before, tokens, counts, picks.padded(len(held.lengths) + tokens.size))
        yield _Pending([member for _, member in batch], result)


def _context_of(group: Group) -> Ids:
    return next(iter(group.values())).context


def _targets_of(group: Group) -> int:
    return sum(len(row.targets) for row in group.values())


# --- Batches ------------------------------------------------------------------------------------------------


class _Picking:
    """Collects which hidden states predict which ids."""

    def __init__(self):
        self.index: list[int] = []
        self.targets: list[int] = []

    def add(self, index: Iterable[int], targets: Ids) -> None:
        self.index.extend(index)
        self.targets.extend(targets)

    def padded(self, capacity: int) -> Picks:
        """As arrays of one length for all batches of a shape, which hold `capacity` at most."""
        arrays = np.zeros((2, -(-capacity // LOGIT_ROWS) * LOGIT_ROWS), np.int32)
        arrays[0, : len(self.index)], arrays[1, : len(self.targets)] = self.index, self.targets
        return Picks(arrays[0], arrays[1], np.int32(len(self.index)))


class _Pending(NamedTuple):
    """A batch in flight: its rows with their places in the request, and the arrays being computed."""

    members: Sequence[tuple[int, Row]]
    result: tuple[Any, Any]


def _collect(batches: Iterable[_Pending], count: int, progress: ProgressCallback) -> list[Score]:
    """Scores in the request's order; fetched one batch behind, so that the device has work while the host prepares."""
    scores: dict[int, Score] = {}
    waiting: list[_Pending] = []
    for batch in itertools.chain(batches, [None]):
        for before in waiting:
            scores |= _fetch(before)
            progress(len(scores), count)
        waiting = [batch]
    return [scores[place] for place in range(count)]


def _fetch(batch: _Pending) -> dict[int, Score]:
    log_p, greedy = (np.asarray(part) for part in batch.result)
    found, start = {}, 0
    for place, row in batch.members:
        span = slice(start, start := start + len(row.targets))
        total = float(log_p[span].sum(dtype=np.float64))
        if not math.isfinite(total):
            raise PolygptError("a log-likelihood is not a finite number: the model's weights are damaged or overflow")
        found[place] = Score(total, bool(greedy[span].all()))
    return found
