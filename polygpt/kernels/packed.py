"""Packed weights, the form that inference reads fastest: matrices stored [out, in], in 32, 16 or 8 bits.

A product with few rows takes as long as reading its weights, so 16 bits are twice as fast as 32. XLA's CPU backend gets
there only with some help (figures in benchmarks/README.md):
- it converts a whole stack of 16-bit floats before it slices one layer out of it, so their bits are kept as integers;
- it fuses slicing and conversion into a product only if that has a single row;
- it copies the second operand of a product, so with some rows the weights come first;
- it copies a layer's float32 matrix out of its stack, unless each is an array of its own in a branch of a switch.

Nothing here is differentiable: training uses plain parameters.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from polygpt.kernels.stacks import InStack, from_stored

WeightType = Literal["float32", "bfloat16", "float16", "int8"]
WEIGHT_TYPES: tuple[WeightType, ...] = get_args(WeightType)
# Up to this many rows are multiplied one by one, while a matrix stays in the processor's cache: 53 M weights of 16 bits
# took 6 ms for 2 rows and 12 for 4; all rows at once 12 and 12.
FEW_ROWS = 4
# Up to this many rows are the second operand of a float32 product, and a layer's matrix is read in place. With 80 M
# weights 8 rows took 23 ms this way, 26 with the matrix copied out of its stack and 45 with the operands swapped; 32
# rows 55, 87 and 100; 512 rows, which are bound by arithmetic, 640, 600 and 550.
SOME_ROWS = 128
ALIGNMENT = 64  # bytes: XLA uses NumPy's memory without a copy only if it is aligned so
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
        matrices: the same memory again, as an array [O, I] for each layer; () if that would not be faster.
        inputs: the axes that a product contracts, I in all; none for a table.
        outputs: those that remain, O in all.
        dtype: of the numbers that the values stand for.
    """

    values: Any  # not always arrays: JAX also puts other things into trees
    scale: Any
    matrices: tuple[Any, ...]
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
        converted = not self.values.dtype == x.dtype == jnp.float32
        if jax.default_backend() != "cpu":
            y = self._at_once(x, self._own(self.values))
        elif in_loop and converted and self.values.shape[0] > BLOCK:
            y = self._in_blocks(x)
        elif self.matrices and self.layer is not None and FEW_ROWS < len(x) <= SOME_ROWS and not converted:
            y = self._in_branch(x)
        else:
            y = self._on_cpu(x, self._own(self.values))
        return y if self.scale is None else y * self._own(self.scale)

    def _own(self, stack: Array) -> Array:
        return stack if self.layer is None else lax.dynamic_index_in_dim(stack, self.layer, keepdims=False)

    def _in_branch(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        """The product of each layer is a branch of a switch, which reads the layer's own matrix."""

        def product(matrix: Array, x: Array) -> Array:
            return lax.dot_general(matrix, x, (((1,), (1,)), ((), ())))

        # Transposed outside the branch: inside, XLA would swap the operands again.
        return lax.switch(self.layer, [partial(product, matrix) for matrix in self.matrices], x).T

    def _in_blocks(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        """Block by block of outputs: XLA would hoist the conversion of a whole matrix out of a loop over tokens."""
        outputs = self.values.shape[0]

        def one(start: Array) -> Array:
            block = lax.dynamic_slice_in_dim(self.values, jnp.minimum(start, outputs - BLOCK), BLOCK)
            return self._on_cpu(x, block)

        blocks = lax.map(one, jnp.arange(0, outputs, BLOCK))
        whole = jnp.moveaxis(blocks[:-1], 0, 1).reshape(x.shape[0], -1)
        return jnp.concatenate([whole, blocks[-1][:, whole.shape[1] - outputs :]], axis=1)

    def _on_cpu(self, x: Float[Array, "M I"], matrix: Array) -> Float[Array, "M O"]:
        """The barriers keep XLA from rewriting the products: as one of all rows, or with swapped operands."""
        barrier = lax.optimization_barrier
        if x.shape[0] <= FEW_ROWS:
            x = x.astype(jnp.float32)
            # XLA recomputes for every output what it considers cheap; a division is not.
            x = x / (1 + 0 * x)
            return jnp.stack([self._of_row(row, matrix) for row in x])
        if x.dtype == jnp.bfloat16 or x.shape[0] > SOME_ROWS:
            return self._at_once(x, matrix)
        return barrier(jnp.matmul(from_stored(matrix, self.dtype).astype(x.dtype), barrier(x.T))).T.astype(jnp.float32)

    def _of_row(self, row: Float[Array, " I"], matrix: Array) -> Float[Array, " O"]:
        """Products short enough to be fused, so that each converts its weights while reading them."""
        barrier = lax.optimization_barrier
        edges = np.linspace(0, row.size, row.size // FUSED + 2).astype(int)
        y = jnp.zeros(len(matrix))
        for piece in (slice(*pair) for pair in itertools.pairwise(edges)):
            numbers = from_stored(matrix[:, piece], self.dtype).astype(jnp.float32)
            # Not y + row @ numbers.T: XLA fuses an addition with the product before it, which then no longer fuses
            # with the conversion, and the weights are written to memory in 32 bits.
            y -= barrier(barrier(-row[piece]) @ numbers.T)
        return y

    def _at_once(self, x: Float[Array, "M I"], matrix: Array) -> Float[Array, "M O"]:
        numbers = from_stored(matrix, self.dtype).astype(x.dtype)
        return lax.dot_general(x, numbers, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def pack(values: Array | np.ndarray, inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: WeightType) -> Packed:
    """The packed form of a parameter.

    Args:
        values: [*stack, *inputs, *outputs]; a table [rows, width].
        inputs: the axes that are contracted; none of a table.
        outputs: those that remain.
        dtype: int8 has 127 steps on each side of 0, up to the largest weight of each output (a table: of each row).
    """
    own = np.asarray(values)
    if inputs:
        stack = own.shape[: own.ndim - len(inputs) - len(outputs)]
        own = own.reshape(*stack, math.prod(inputs), math.prod(outputs)).swapaxes(-1, -2)
    return pack_rows(own, inputs, outputs, dtype)


def pack_rows(
    rows: np.ndarray, inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: WeightType, device: Any = None
) -> Packed:
    """The packed form of a parameter that is already stored [*stack, O, I]. Aligned memory is used without a copy."""
    if dtype == "int8":
        steps, scale = _quantize(jax.device_put(rows, device, may_alias=True))
        return Packed(steps, scale, (), inputs, outputs, dtype)
    numbers = rows.astype(jnp.dtype(dtype), copy=False)
    bits = numbers.view(np.uint16) if numbers.itemsize == 2 else numbers
    # JAX transposes a matrix on its way to the device faster than NumPy or XLA (25, 67 and 200 ms for 27 M numbers).
    own = jax.device_put(bits, device, may_alias=True)
    return Packed(own, None, _separate(own), inputs, outputs, dtype)


def _separate(stack: Array) -> tuple[Array, ...]:
    """The matrices of a float32 stack as separate arrays in the same memory, if a CPU can have them."""
    (device,) = stack.devices()
    aligned = stack.nbytes // len(stack) % ALIGNMENT == 0
    if device.platform != "cpu" or stack.dtype != jnp.float32 or stack.ndim < 3 or not aligned:
        return ()
    return tuple(jax.device_put(matrix, device, may_alias=True) for matrix in np.asarray(stack))


@jax.jit
def _quantize(matrix: Float[Array, "*stack O I"]) -> tuple[Int8[Array, "*stack O I"], Float[Array, "*stack O"]]:
    """Each weight rounded to one of 255 steps, and the size of a step for each output."""
    matrix = matrix.astype(jnp.float32)
    largest = jnp.abs(matrix).max(-1)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return jnp.rint(matrix / scale[..., None]).astype(jnp.int8), scale
