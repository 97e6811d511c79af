"""Batches of windows: batch `i` is a pure function of (seed, i), so resuming needs nothing but `i`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np

from polygpt.data.packing import LOOKAHEAD
from polygpt.data.shards import TokenSplit
from polygpt.data.windows import Arrays, DocumentWindows, StreamWindows, Windows
from polygpt.errors import RequestError

# When the order of windows changes, an older run must not resume silently.
ORDER = "grain-index-shuffle-1"
PACKED = "best-fit-decreasing-1"


class Loader:
    """Batches of a split, for training (shuffled, epoch after epoch) or evaluation (one pass, in order).

    Training windows are full: window `w` starts at token `w * stride`. Evaluation predicts every token but the first
    exactly once: with a `stride` below the context length, windows overlap, and each counts only the targets that the
    previous one did not contain. The last window and the last batch are padded with zeros that do not count.

    With `packing` "documents", a window holds whole documents (see `DocumentWindows`), in training and evaluation.

    Attributes:
        num_windows: windows per epoch.
        num_batches: batches per epoch: only full ones in training, all of them in evaluation.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        context_length: int,
        batch_size: int,
        stride: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        packing: str = "windows",
    ):
        """A loader of `split`, with T = `context_length` and B = `batch_size`.

        Raises:
            RequestError: a number is out of range, or the split is shorter than one window.
        """
        self.split, self.context_length, self.batch_size = split, context_length, batch_size
        self.stride = context_length if stride is None else stride
        self.seed, self.shuffle, self.packing = seed, shuffle, packing
        self._check()
        self.windows: Windows = (
            DocumentWindows(split, context_length)
            if packing == "documents"
            else StreamWindows(split, context_length, self.stride, training=shuffle)
        )
        self.num_windows = self.windows.count
        if shuffle:
            self.num_batches = max(1, self.num_windows // batch_size)
            self._order = _shuffled(self.num_windows, seed)
        else:
            self.num_batches = -(-self.num_windows // batch_size)
            self._order = range(self.num_windows)

    def _check(self) -> None:
        for name in ("context_length", "batch_size", "stride"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.seed < 0:
            raise RequestError(f"seed must not be negative ({self.seed})")
        if not self.shuffle and self.stride > self.context_length:
            raise RequestError(
                f"a stride of {self.stride} skips tokens between windows of {self.context_length}; "
                "in evaluation it must be at most the context length"
            )
        full = self.shuffle and self.packing == "windows"
        needed = self.context_length + 1 if full else 2
        if self.split.tokens < needed:
            window = f"{needed} (context_length {self.context_length} + 1)" if full else "2"
            fix = "give more text, or lower model.context_length" if full else "give more text"
            raise RequestError(f"{self.split.name} has {self.split.tokens} tokens, one window needs {window};\n{fix}")

    def empty(self, rows: int | None = None) -> Arrays:
        """The arrays of a batch, or of so many rows of one, zeroed."""
        shape = (self.batch_size if rows is None else rows, self.context_length)
        names = ("input", "target", *(["segment_ids"] if self.packing == "documents" else []))
        return {"mask": np.zeros(shape, np.float32)} | {name: np.zeros(shape, np.int32) for name in names}

    def batch(self, i: int, rows: Sequence[int] | None = None) -> Arrays:
        """Batch `i`, or only these `rows` of it.

        `input` and `target` are int32 `[B, T]`, `mask` is float32 `[B, T]` (1 where a target counts); packed documents
        also have `segment_ids`, int32 `[B, T]`. Each training epoch is shuffled anew, and a batch may contain the end
        of one and the start of the next. Targets are the inputs shifted by one token.

        Raises:
            IndexError: `i` is negative, or (evaluation) not below `num_batches`.
        """
        if i < 0 or (not self.shuffle and i >= self.num_batches):
            raise IndexError(f"batch {i} of {self.num_batches}")
        rows = range(self.batch_size) if rows is None else rows
        arrays = self.empty(len(rows))
        for place, row in enumerate(rows):
            position = i * self.batch_size + row
            if self.shuffle or position < self.num_windows:
                self.fill(position, arrays, place)
        return arrays

    def fill(self, position: int, arrays: Arrays, row: int) -> None:
        """Writes the window at `position` of the order (of all epochs) into row `row` of a zeroed batch."""
        self.windows.fill(int(self._order[position]), {name: values[row] for name, values in arrays.items()})

    def facts(self, steps: int) -> dict[str, str]:
        """What is worth showing before a run of `steps` batches."""
        if self.packing != "documents":
            return {}
        return {"packing": f"documents, {self.windows.packing.padding:.1%} padding"}

    def epoch(self) -> Iterator[Arrays]:
        """The batches of the first epoch; in evaluation, all of them."""
        return (self.batch(i) for i in range(self.num_batches))

    @property
    def order(self) -> str:
        """The method by which windows are filled and ordered."""
        return ORDER if self.packing == "windows" else f"{ORDER} {PACKED}-of-{LOOKAHEAD}"

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of everything that determines which tokens are in batch `i`."""
        parts = [
            self.split.fingerprint,
            self.context_length,
            self.batch_size,
            self.stride,
            self.seed,
            self.shuffle,
            self.order,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _shuffled(num_windows: int, seed: int) -> Sequence[int]:
    """Window numbers in an order that is computed, not stored: one permutation per epoch."""
    import grain  # takes over a second and imports JAX; evaluation does without it

    # Grain shuffles epoch e with seed + e, so runs with seeds 0 and 1 would see the same orders one epoch apart.
    # Hashing the seed first avoids that, and allows a seed of any size (Grain's must fit in 32 bits).
    spread = int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
    return grain.MapDataset.range(num_windows).shuffle(seed=spread).repeat()
