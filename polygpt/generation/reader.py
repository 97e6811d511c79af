"""Prompts are read a chunk at a time into a row of decoding state of their own, from which they enter a slot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from polygpt.generation.prefix_cache import PrefixCache
from polygpt.generation.programs import SlotPrograms
from polygpt.generation.states import placed
from polygpt.model import Model, Params

# Tokens of a prompt's last chunks, so that a short prompt is read about as fast as one step of decoding. Each larger
# size is this many times the one before.
SMALL, FACTOR = 16, 4
# A chunk of up to this many tokens may be mostly padding, which products in C++ leave out (`kernels/native`): 40 tokens
# of SmolLM2-135M take 60 ms as one chunk of 64, and 93 as three of 16.
PADDED = 64


class PromptReader:
    """One row of decoding state, and how much of a prompt it has read.

    Attributes:
        row: the decoding state after the first `position` tokens of the prompt.
        prefixes: states of earlier prompts' beginnings.
        cached: tokens of this prompt that were not read again.
    """

    def __init__(
        self, model: Model, params: Params, programs: SlotPrograms, length: int, chunk: int, prefixes: PrefixCache
    ):
        self.params, self.prefixes = params, prefixes
        self._sizes = [chunk]  # the largest first
        while self._sizes[-1] > SMALL:
            self._sizes.append(max(self._sizes[-1] // FACTOR, SMALL))
        self._model, self._programs, self._length = model, programs, length
        self.reset()

    def reset(self) -> None:
        """An empty row; needed after a program that was interrupted, which has given up its arguments' memory."""
        empty = jax.tree.map(jnp.copy, self._model.init_state(1, self._length))
        self.row: PyTree = placed(empty, self.params)
        self._tokens: tuple[int, ...] = ()
        self._keys: list[bytes] = []
        self._held: tuple[int, ...] | None = None  # a prompt that the row has read to its end
        self.position = self.cached = 0

    def forget(self) -> None:
        """Drops all states of earlier prompts."""
        self.prefixes.clear()
        self.reset()

    def begin(self, tokens: Sequence[int]) -> None:
        """Prepares for a prompt: nothing is left to read if the row holds it already."""
        self._tokens = tuple(tokens)
        if self._held == self._tokens:
            self.position = self.cached = len(self._tokens)
            return
        self._held, self.position = None, 0
        self.row = self._programs.restart(self.row)
        self._keys = self.prefixes.keys(self._tokens)
        for block in self.prefixes.find(self._keys):
            self.row = self._programs.put(self.row, block, np.int32(self.position))
            self.position += self.prefixes.chunk
        self.cached = self.position

    def read(self) -> bool:
        """Reads one chunk more; whether the whole prompt has been read."""
        left = len(self._tokens) - self.position
        if left > 0:
            self._read_chunk(left)
        if self.position < len(self._tokens):
            return False
        self._held = self._tokens
        return True

    def _read_chunk(self, left: int) -> None:
        size = next_chunk(self._sizes, left)
        count = min(left, size)
        tokens = np.zeros((1, size), np.int32)
        tokens[0, :count] = self._tokens[self.position : self.position + count]
        start, chunk = np.int32(self.position), self._sizes[0]
        fresh = self.position == 0
        self.row = self._programs.prefill(self.params, self.row, tokens, start, np.int32(count), fresh=fresh)
        self.position += count
        done, rest = divmod(self.position, chunk)
        if not rest and size == chunk and self.prefixes.wants(self._keys[done - 1]):
            self.prefixes.add(self._keys[:done], self._programs.take(self.row, start))

    def compile(self) -> None:
        """Compiles every program that reads prompts."""
        for size, fresh in itertools.product(self._sizes, (True, False)):
            tokens = np.zeros((1, size), np.int32)
            self.row = self._programs.prefill(self.params, self.row, tokens, np.int32(0), np.int32(1), fresh=fresh)
        if self.prefixes.limit:
            block = self._programs.take(self.row, np.int32(0))
            self.row = self._programs.put(self.row, block, np.int32(0))
        self.row, self._held = self._programs.restart(self.row), None


def next_chunk(sizes: Sequence[int], left: int) -> int:
    """Which of the compiled sizes, the largest first, the next chunk of a prompt has that has `left` tokens to read.

    It follows from the prompt alone, so that a state does not depend on what the prefix cache held.
    """
    for size, smaller in itertools.pairwise(sizes):
        if left > (smaller if size <= PADDED else size - smaller):
            return size
    return sizes[-1]
