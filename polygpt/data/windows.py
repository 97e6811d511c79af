"""Windows of a token stream: the rows of batches, numbered from 0."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from polygpt.data.packing import pack
from polygpt.data.shards import TokenSplit

Arrays = dict[str, np.ndarray]


class Windows(Protocol):
    """Windows of `context_length` tokens, `count` of them."""

    count: int

    def fill(self, window: int, row: Arrays) -> None:
        """Writes a window into `row`: zeroed arrays [T] of a batch."""
        ...


class StreamWindows:
    """Windows that start every `stride` tokens of the stream, whatever documents they cross.

    For evaluation, the last window may be padded, and each counts only the targets that the previous one did not
    contain.
    """

    def __init__(self, split: TokenSplit, context_length: int, stride: int, training: bool):
        self.split, self.context_length, self.stride, self.training = split, context_length, stride, training
        if training:
            self.count = (split.tokens - context_length - 1) // stride + 1
        else:
            later = max(0, split.tokens - 1 - context_length)  # targets after the first window's
            self.count = 1 + -(-later // stride)

    def fill(self, window: int, row: Arrays) -> None:
        start = window * self.stride
        ids = self.split.read(start, min(start + self.context_length + 1, self.split.tokens))
        seen = 0 if self.training or window == 0 else self.context_length - self.stride
        row["input"][: len(ids)] = ids[: self.context_length]
        row["target"][: len(ids) - 1] = ids[1:]
        row["mask"][seen : len(ids) - 1] = 1


class DocumentWindows:
    """Windows of whole documents, each with its own segment id; padding has one as well, and does not count.

    The targets of all windows are those of the stream: every token but the stream's first. What follows a document is
    the end-of-text token before the next one; without such a token, the last token of a document has no target.
    """

    def __init__(self, split: TokenSplit, context_length: int):
        self.split, self.packing = split, pack(split.document_offsets(), context_length)
        self.count = self.packing.num_windows

    def fill(self, window: int, row: Arrays) -> None:
        packing, filled = self.packing, 0
        first, last = (int(piece) for piece in packing.first[window : window + 2])
        for segment, piece in enumerate(range(first, last)):
            start, length = int(packing.starts[piece]), int(packing.lengths[piece])
            ids = self.split.read(start, min(start + length + 1, self.split.tokens))
            follows = len(ids) > length and (self.split.end_of_text is not None or not packing.ends[piece])
            targets = length if follows else length - 1
            row["input"][filled : filled + length] = ids[:length]
            row["target"][filled : filled + targets] = ids[1 : targets + 1]
            row["mask"][filled : filled + targets] = 1
            row["segment_ids"][filled : filled + length] = segment
            filled += length
        row["segment_ids"][filled:] = last - first
