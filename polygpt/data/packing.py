"""Packing: which documents share a window, by best fit decreasing over blocks of documents in their order.

A document longer than a window is divided into pieces of a window's length; the last piece may be shorter. Every token
is in exactly one window.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

LOOKAHEAD = 8192  # pieces that are packed together; more fill windows better and take longer


class Packing(NamedTuple):
    """Window `w` holds the pieces `first[w]` to `first[w + 1]`.

    Attributes:
        starts: where each piece starts in the token stream.
        lengths: tokens of each piece, at most the context length.
        ends: whether a piece is the end of its document.
        first: the first piece of each window, and the number of pieces.
        capacity: tokens that a window can hold.
    """

    starts: Int[np.ndarray, "pieces"]
    lengths: Int[np.ndarray, "pieces"]
    ends: Int[np.ndarray, "pieces"]
    first: Int[np.ndarray, "windows_and_one"]
    capacity: int

    @property
    def num_windows(self) -> int:
        """How many windows the documents fill."""
        return len(self.first) - 1

    @property
    def padding(self) -> float:
        """The share of all positions that holds no token."""
        return 1 - int(self.lengths.sum()) / (self.num_windows * self.capacity)


def pack(offsets: Int[np.ndarray, "documents_and_one"], capacity: int) -> Packing:
    """Packs documents, given where each starts in the token stream (and where the last ends), into windows."""
    sizes = np.diff(offsets)
    counts = -(-sizes // capacity)
    last = np.cumsum(counts) - 1
    starts = np.repeat(offsets[:-1], counts)
    starts += capacity * (np.arange(len(starts)) - np.repeat(last + 1 - counts, counts))
    lengths = np.full(len(starts), capacity, np.int32)
    lengths[last] = offsets[1:] - starts[last]
    ends = np.zeros(len(starts), bool)
    ends[last] = True
    windows = np.empty(len(starts), np.int64)
    total = 0
    for block in range(0, len(starts), LOOKAHEAD):
        windows[block : block + LOOKAHEAD], used = _best_fit(lengths[block : block + LOOKAHEAD], capacity, total)
        total += used
    order = np.argsort(windows, kind="stable")
    first = np.searchsorted(windows[order], np.arange(total + 1))
    return Packing(starts[order], lengths[order], ends[order], first, capacity)


def _best_fit(lengths: Int[np.ndarray, "pieces"], capacity: int, base: int) -> tuple[Int[np.ndarray, "pieces"], int]:
    """The window of each piece, numbered from `base`, and how many windows are used.

    Longest first, each piece goes into the fullest window that has room for it.
    """
    windows = np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity)]  # windows by how many tokens they have room for
    rooms, used = 0, 0  # bit r of `rooms` is set if with_room[r] is not empty
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            window = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            window, room = used, capacity
            used += 1
        windows[piece] = base + window
        if room > length:
            with_room[room - length].append(window)
            rooms |= 1 << (room - length)
    return windows, used
