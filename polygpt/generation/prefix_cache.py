"""Decoding states of prompts' beginnings, kept by their tokens, the least recently used dropped first."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array


class PrefixCache:
    """Blocks of decoding state by the tokens up to their end, within a limit of bytes.

    A prompt's block is of use only together with all blocks before it, so those count as used after it.
    """

    def __init__(self, limit: int, chunk: int):
        """`limit`: bytes; 0 keeps nothing. `chunk`: tokens in a block."""
        self.limit, self.chunk, self.bytes = limit, chunk, 0
        self._blocks: OrderedDict[bytes, list[Array]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def clear(self) -> None:
        """Drops everything."""
        self._blocks.clear()
        self.bytes = 0

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """The key of each whole block of `tokens`: a digest of everything up to its end."""
        ids, digest, found = np.asarray(tokens, np.int32), b"", []
        for start in range(0, len(ids) - self.chunk + 1, self.chunk):
            digest = hashlib.sha256(digest + ids[start : start + self.chunk].tobytes()).digest()
            found.append(digest)
        return found

    def find(self, keys: Sequence[bytes]) -> list[list[Array]]:
        """The blocks of as many of the first `keys` as are here without a gap."""
        blocks = []
        for key in keys:
            if key not in self._blocks:
                break
            blocks.append(self._blocks[key])
        self._touch(keys[: len(blocks)])
        return blocks

    def wants(self, key: bytes) -> bool:
        """Whether a block may be added."""
        return self.limit > 0 and key not in self._blocks

    def add(self, keys: Sequence[bytes], block: list[Array]) -> None:
        """Keeps the block of the last of `keys`, and drops the least recently used until all fit."""
        self._blocks[keys[-1]] = block
        self.bytes += _size(block)
        self._touch(keys)
        while self.bytes > self.limit:
            self.bytes -= _size(self._blocks.popitem(last=False)[1])

    def _touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)


def _size(block: list[Array]) -> int:
    return sum(leaf.nbytes for leaf in block)
