"""Packed weights, the form that inference reads fastest: matrices stored [out, in], in 32, 16 or 8 bits.

A product with few rows takes as long as reading its weights, so 16 bits are twice as fast as 32. With several rows CPUs
take it in C++ (`native`); XLA's CPU backend gets there only with some help (figures in benchmarks/README.md):
- it converts a whole stack of 16-bit floats before it slices one layer out of it, so their bits are kept as integers;
- it fuses slicing and conversion into a product only if that has a single row;
- it copies the second operand of a product, so with some rows the weights come first.

Nothing here is differentiable: training uses plain parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from polygpt.kernels import native
from polygpt.kernels.stacks import InStack, from_stored
from polygpt.kernels.weights import Weight

# Products of this many rows are computed in C++. A step of 8 rows of SmolLM2-135M takes 22 ms in float32 and 19 in int8
# (36 and 28 by XLA), a chunk of 64 tokens 92 and 87 (101 and 100). One row XLA multiplies as fast as memory allows; 128
# and more as fast with AVX-512, and 7 % faster with AVX2.
NATIVE_ROWS = range(2, 65)
# Without a compiler, up to this many rows are multiplied one by one, while a matrix stays in the processor's cache: 53
# M weights of 16 bits took 6 ms for 2 rows and 12 for 4; all rows at once 12 and 12.
FEW_ROWS = 4
# Up to this many rows are the second operand of a product: with 80 M weights 8 rows took 26 ms this way, and 45 with
# the operands swapped; 32 rows 87 and 100; 512 rows, which are bound by arithmetic, 600 and 550.
SOME_ROWS = 128
# XLA fuses the product of a vector and a matrix if the vector is shorter than this (16 kB).
FUSED = 4096
# Outputs of the head that are computed together.
BLOCK = 4096


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed(InStack):
    """A matrix of shape [*stack, *inputs, *outputs], or a table [rows, width], packed.

    `packed[index]` gives the parameter's own numbers, as `parameter[index]` would; within a layer the layer's.

    Attributes:
        values: [*stack, O, I], or a table as it is: float32, int8, or the bits of 16-bit floats as unsigned integers.
        scale: float32 [*stack, O] (a table: [rows]), the factor of int8 values, or None.
        inputs: the axes that a product contracts, I in all; none for a table.
        outputs: those that remain, O in all.
        dtype: of the numbers that the values stand for.
    """

    values: Any  # not always arrays: JAX also puts other things into trees
    scale: Any
    inputs: tuple[int, ...] = field(metadata={"static": True})
    outputs: tuple[int, ...] = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})

    def __getitem__(self, index: Any) -> Float[Array, "..."]:
        if not self.inputs:
            numbers = from_stored(self.values[index], self.dtype)
            return numbers if self.scale is None else numbers * self.scale[index][..., None]
        numbers = from_stored(self._own(self.values), self.dtype)
        if self.scale is not None:
            numbers = numbers * self._own(self.scale)[..., None]
        return numbers.swapaxes(-1, -2).reshape(*numbers.shape[:-2], *self.inputs, *self.outputs)[index]

    def times(self, x: Float[Array, "M I"], *, in_loop: bool = False) -> Float[Array, "M O"]:
        """See `Weight.times`. On a CPU a matrix `in_loop` that has to be converted is taken in blocks."""
        if self._is_native(x):
            return native.products(x, [(self.values, self.scale)], self.layer)[0]
        converted = not self.values.dtype == x.dtype == jnp.float32
        if jax.default_backend() != "cpu":
            y = at_once(x, from_stored(self._own(self.values), self.dtype).astype(x.dtype))
        elif in_loop and converted and self.values.shape[0] > BLOCK:
            y = self._in_blocks(x)
        else:
            y = self._on_cpu(x, self._own(self.values))
        return y if self.scale is None else y * self._own(self.scale)

    def times_each(self, x: Float[Array, "M I"], weights: Sequence[Weight]) -> list[Float[Array, "M _"]]:
        """See `Weight.times_each`."""
        if self._is_native(x) and all(isinstance(each, Packed) and each._is_native(x) for each in weights):
            return native.products(x, [(each.values, each.scale) for each in (self, *weights)], self.layer)
        return [each.times(x) for each in (self, *weights)]

    def _is_native(self, x: Float[Array, "M I"]) -> bool:
        """Whether C++ multiplies `x` with this matrix."""
        return len(x) in NATIVE_ROWS and x.dtype == jnp.float32 and self.dtype != "float16" and native.available()

    def _own(self, stack: Array) -> Array:
        return stack if self.layer is None else lax.dynamic_index_in_dim(stack, self.layer, keepdims=False)

    def _in_blocks(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        def block(start: Array) -> Array:
            return self._on_cpu(x, lax.dynamic_slice_in_dim(self.values, start, BLOCK))

        return in_blocks(block, len(self.values))

    def _on_cpu(self, x: Float[Array, "M I"], matrix: Array) -> Float[Array, "M O"]:
        if len(x) > FEW_ROWS:
            return many_rows(x, from_stored(matrix, self.dtype).astype(x.dtype))
        return few_rows(x, lambda row: row_product(row, lambda piece: from_stored(matrix[:, piece], self.dtype)))


def in_blocks(block: Callable[[Array], Array], outputs: int) -> Float[Array, "M O"]:
    """`block(start)` gives BLOCK outputs. XLA would hoist the conversion of a whole matrix out of a loop of tokens."""
    blocks = lax.map(lambda start: block(jnp.minimum(start, outputs - BLOCK)), jnp.arange(0, outputs, BLOCK))
    whole = jnp.moveaxis(blocks[:-1], 0, 1).reshape(blocks.shape[1], -1)
    return jnp.concatenate([whole, blocks[-1][:, whole.shape[1] - outputs :]], axis=1)


def few_rows(x: Float[Array, "M I"], product: Callable[[Array], Array]) -> Float[Array, "M O"]:
    """The product of each row by itself."""
    x = x.astype(jnp.float32)
    # XLA recomputes for every output what it considers cheap; a division is not.
    x = x / (1 + 0 * x)
    return jnp.stack([product(row) for row in x])


def row_product(row: Float[Array, " I"], numbers: Callable[[slice], Array]) -> Float[Array, " O"]:
    """Products short enough to be fused with `numbers(piece)` [O, piece]: each converts its weights while reading them.

    The barriers keep XLA from rewriting the products: as one of all rows, or with swapped operands.
    """
    barrier = lax.optimization_barrier
    edges = np.linspace(0, row.size, row.size // FUSED + 2).astype(int)
    y = jnp.zeros(())
    for piece in (slice(*pair) for pair in itertools.pairwise(edges)):
        # Not y + row @ numbers.T: XLA fuses an addition with the product before it, which then no longer fuses
        # with the conversion, and the weights are written to memory in 32 bits.
        y -= barrier(barrier(-row[piece]) @ numbers(piece).astype(jnp.float32).T)
    return y


def many_rows(x: Float[Array, "M I"], numbers: Float[Array, "O I"]) -> Float[Array, "M O"]:
    """The product of all rows, the weights first where that is faster."""
    if x.dtype == jnp.bfloat16 or len(x) > SOME_ROWS:
        return at_once(x, numbers)
    barrier = lax.optimization_barrier
    return barrier(jnp.matmul(numbers, barrier(x.T))).T.astype(jnp.float32)


def at_once(x: Float[Array, "M I"], numbers: Float[Array, "O I"]) -> Float[Array, "M O"]:
    return lax.dot_general(x, numbers, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
