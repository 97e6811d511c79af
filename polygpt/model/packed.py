"""Weights in the form that inference reads fastest: matrices a row an output, in 32, 16 or 8 bits.

A product with few rows takes as long as its weights take to read, so that 16 bits are twice as fast as 32. XLA on a
CPU has to be led there (the figures are in benchmarks/README.md): it converts a whole stack of layers before it takes
one layer of 16-bit floats out of it, so their bits are kept as integers; it slices and converts while it reads only for
a product of one row; it copies what stands second in a product, so with some rows the weights stand first; and it
copies a layer's matrix of 32 bits out of its stack, unless each is an array of its own that a branch is chosen for.

Nothing here is differentiable: training has parameters as they are.
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

from polygpt.model.stacks import InStack, as_numbers

WeightType = Literal["float32", "bfloat16", "float16", "int8"]
WEIGHT_TYPES: tuple[WeightType, ...] = get_args(WeightType)
# Up to so many rows are multiplied one after the other, the weights of a matrix staying in the cache meanwhile: 53 M
# weights of 16 bits took 6 ms for 2 rows and 12 for 4, all at once 12 and 12.
FEW_ROWS = 4
# Up to so many rows stand second in a product of 32 bits, and multiply a layer's matrix where it lies. Of 80 M weights
# 8 rows took 23 ms so, 26 copied out of their stack and 45 the other way round; 32 rows 55, 87 and 100; 512 rows, which
# are bound by arithmetic, 640, 600 and 550.
SOME_ROWS = 128
ALIGNMENT = 64  # bytes: what XLA needs to take over NumPy's memory instead of copying it
# XLA fuses a product of a vector and a matrix where the vector is shorter than this (16 kB).
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
        scale: float32 [*stack, O] (a table: [rows]) by which int8 is to be multiplied, or None.
        matrices: the same memory once more, an array [O, I] for each layer; () where that would not be faster.
        inputs: the axes that a product contracts, I in all; none for a table.
        outputs: those that remain, O in all.
        dtype: what the values mean.
    """

    values: Any  # JAX puts other things than arrays into a tree, too
    scale: Any
    matrices: tuple[Any, ...]
    inputs: tuple[int, ...] = field(metadata={"static": True})
    outputs: tuple[int, ...] = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})

    def __getitem__(self, index: Any) -> Float[Array, "..."]:
        if not self.inputs:
            numbers = as_numbers(self.values[index], self.dtype)
            return numbers if self.scale is None else numbers * self.scale[index][..., None]
        numbers = as_numbers(self._own(self.values), self.dtype)
        if self.scale is not None:
            numbers = numbers * self._own(self.scale)[..., None]
        return numbers.swapaxes(-1, -2).reshape(*numbers.shape[:-2], *self.inputs, *self.outputs)[index]

    def times(self, x: Float[Array, "M I"], *, in_loop: bool = False) -> Float[Array, "M O"]:
        """`x` times the matrix (a table: its transpose), accumulated in float32; float32 [M, O].

        `in_loop`: a loop may come back to this very matrix, as decoding does to the head's (and a scan over layers does
        not); on a CPU it is then taken in blocks, if it has to be converted.
        """
        converted = not self.values.dtype == x.dtype == jnp.float32
        if jax.default_backend() != "cpu":
            y = self._at_once(x, self._own(self.values))
        elif in_loop and converted and self.values.shape[0] > BLOCK:
            y = self._in_blocks(x)
        elif self.matrices and self.layer is not None and FEW_ROWS < len(x) <= SOME_ROWS and not converted:
            y = self._by_itself(x)
        else:
            y = self._on_cpu(x, self._own(self.values))
        return y if self.scale is None else y * self._own(self.scale)

    def _own(self, stack: Array) -> Array:
        return stack if self.layer is None else lax.dynamic_index_in_dim(stack, self.layer, keepdims=False)

    def _by_itself(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        """The product of each layer is a branch, which reads the layer's own matrix."""

        def product(matrix: Array, x: Array) -> Array:
            return lax.dot_general(matrix, x, (((1,), (1,)), ((), ())))

        # Turned not before it has left the branch: there XLA would let the weights be second.
        return lax.switch(self.layer, [partial(product, matrix) for matrix in self.matrices], x).T

    def _in_blocks(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        """Block after block of outputs: what a loop over tokens does not change, XLA would convert ahead and keep."""
        outputs = self.values.shape[0]

        def one(start: Array) -> Array:
            block = lax.dynamic_slice_in_dim(self.values, jnp.minimum(start, outputs - BLOCK), BLOCK)
            return self._on_cpu(x, block)

        blocks = lax.map(one, jnp.arange(0, outputs, BLOCK))
        whole = jnp.moveaxis(blocks[:-1], 0, 1).reshape(x.shape[0], -1)
        return jnp.concatenate([whole, blocks[-1][:, whole.shape[1] - outputs :]], axis=1)

    def _on_cpu(self, x: Float[Array, "M I"], matrix: Array) -> Float[Array, "M O"]:
        """The barriers keep XLA from writing products otherwise: as one of all rows, or with the weights second."""
        keep = lax.optimization_barrier
        if x.shape[0] <= FEW_ROWS:
            x = x.astype(jnp.float32)
            # What XLA holds for cheap it computes again for every output; a division is not cheap.
            x = x / (1 + 0 * x)
            return jnp.stack([self._of_row(row, matrix) for row in x])
        if x.dtype == jnp.bfloat16 or x.shape[0] > SOME_ROWS:
            return self._at_once(x, matrix)
        return keep(jnp.matmul(as_numbers(matrix, self.dtype).astype(x.dtype), keep(x.T))).T.astype(jnp.float32)

    def _of_row(self, row: Float[Array, " I"], matrix: Array) -> Float[Array, " O"]:
        """As products short enough to be fused, each of which converts its weights while it reads them."""
        keep = lax.optimization_barrier
        edges = np.linspace(0, row.size, row.size // FUSED + 2).astype(int)
        y = jnp.zeros(len(matrix))
        for piece in (slice(*pair) for pair in itertools.pairwise(edges)):
            numbers = as_numbers(matrix[:, piece], self.dtype).astype(jnp.float32)
            # Not y + row @ numbers.T: XLA joins an addition with the product before it, which then no longer takes
            # the conversion in, and the weights are written to memory in 32 bits.
            y -= keep(keep(-row[piece]) @ numbers.T)
        return y

    def _at_once(self, x: Float[Array, "M I"], matrix: Array) -> Float[Array, "M O"]:
        numbers = as_numbers(matrix, self.dtype).astype(x.dtype)
        return lax.dot_general(x, numbers, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def pack(values: Array | np.ndarray, inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: WeightType) -> Packed:
    """A parameter packed; one of the host's arrays at a time beside it in memory.

    Args:
        values: [*stack, *inputs, *outputs]; a table [rows, width].
        inputs: the axes that are contracted; none of a table.
        outputs: those that remain.
        dtype: int8 has 127 steps to each side of 0 for each output (a table: each row), as far as its largest weight
            goes.
    """
    own = np.asarray(values)
    if inputs:
        stack = own.shape[: own.ndim - len(inputs) - len(outputs)]
        own = own.reshape(*stack, math.prod(inputs), math.prod(outputs)).swapaxes(-1, -2)
    return pack_rows(own, inputs, outputs, dtype)


def pack_rows(
    rows: np.ndarray, inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: WeightType, device: Any = None
) -> Packed:
    """A parameter packed that lies a row an output already: [*stack, O, I]. Memory that fits is taken over."""
    if dtype == "int8":
        steps, scale = _in_steps(jax.device_put(rows, device, may_alias=True))
        return Packed(steps, scale, (), inputs, outputs, dtype)
    numbers = rows.astype(jnp.dtype(dtype), copy=False)
    bits = numbers.view(np.uint16) if numbers.itemsize == 2 else numbers
    # JAX turns a matrix on its way to the device faster than NumPy does, or XLA (25, 67 and 200 ms for 27 M).
    own = jax.device_put(bits, device, may_alias=True)
    return Packed(own, None, _one_by_one(own), inputs, outputs, dtype)


def _one_by_one(stack: Array) -> tuple[Array, ...]:
    """The matrices of a stack of float32 as arrays of their own, in the same memory, where a CPU can have them so."""
    (device,) = stack.devices()
    aligned = stack.nbytes // len(stack) % ALIGNMENT == 0
    if device.platform != "cpu" or stack.dtype != jnp.float32 or stack.ndim < 3 or not aligned:
        return ()
    return tuple(jax.device_put(matrix, device, may_alias=True) for matrix in np.asarray(stack))


@jax.jit
def _in_steps(matrix: Float[Array, "*stack O I"]) -> tuple[Int8[Array, "*stack O I"], Float[Array, "*stack O"]]:
    """The nearest of 255 steps of each weight, and how large a step is for each output."""
    matrix = matrix.astype(jnp.float32)
    largest = jnp.abs(matrix).max(-1)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return jnp.rint(matrix / scale[..., None]).astype(jnp.int8), scale
