"""Weights in 4 bits: a group of 16 outputs shares a step and a zero point for each input; 5 bits a weight in all.

A weight is unit · step · (level - zero / 16). `level` is 4 bits of its own, `step` and `zero` are bytes of its group,
and `unit` is a float of its output.

Groups lie along the outputs so that a product's inner loop, which runs along the inputs, reads the steps in order
beside the weights; and likelihood suffers less than from groups along the inputs (figures in benchmarks/README.md). A
byte holds two outputs of a group, 8 apart: two products read the same bytes, the second from the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from polygpt.kernels import native
from polygpt.kernels.packed import BLOCK, at_once, few_rows, in_blocks, many_rows, row_product
from polygpt.kernels.stacks import InStack
from polygpt.kernels.weights import Weight

GROUP = 16  # outputs
HALF = GROUP // 2
# Products of up to this many rows are computed in C++: a step of SmolLM2-135M takes 7 ms with one row, 24 with 8, and a
# prompt of 64 tokens 120 ms (10, 63 and 270 by XLA). A prompt of 512 tokens is 20 % faster by XLA.
NATIVE_ROWS = 128
# Without a compiler, up to this many rows are multiplied one by one: to turn a matrix into floats first takes as long
# as about 20 of them. A step of 8 rows of SmolLM2-135M took 75 ms this way, and 220 with the matrix as floats.
FEW_ROWS = 16
ZERO_STEPS = 16  # of a zero point, in one step of the weights
REFITS = 3  # of step and zero point to the levels, which take off a fifth of the loss in likelihood


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedInt4(InStack):
    """As `Packed`, in 4 bits.

    Attributes:
        nibbles: uint8 [*stack, blocks, 8, I]; a block is 16 outputs (a table's rows). The low half of a byte is the
            level of output j, the high half that of output 8 + j.
        step: uint8 [*stack, blocks, I].
        zero: uint8 [*stack, blocks, I], the zero point in sixteenths of a step.
        unit: float32 [*stack, blocks, 16].
        inputs: the axes that a product contracts, I in all; none for a table.
        outputs: those that remain; of a table its shape.
    """

    nibbles: Any  # not always arrays: JAX also puts other things into trees
    step: Any
    zero: Any
    unit: Any
    inputs: tuple[int, ...] = field(metadata={"static": True})
    outputs: tuple[int, ...] = field(metadata={"static": True})

    def __getitem__(self, index: Any) -> Float[Array, "..."]:
        if not self.inputs and hasattr(index, "dtype"):
            return self._rows(index)
        own = self._own()
        numbers = own._numbers(slice(None))
        numbers = numbers.reshape(*numbers.shape[:-3], -1, numbers.shape[-1])[..., : self._count, :]
        if not self.inputs:
            return numbers[index]
        return numbers.swapaxes(-1, -2).reshape(*numbers.shape[:-2], *self.inputs, *self.outputs)[index]

    def times(self, x: Float[Array, "M I"], *, in_loop: bool = False) -> Float[Array, "M O"]:
        """See `Weight.times`. On a CPU a matrix `in_loop` is taken in blocks."""
        if self._is_native(x):
            return self._products(x, [self])[0]
        own = self._own()
        padded = len(own.unit) * GROUP
        if in_loop and padded > BLOCK and jax.default_backend() == "cpu":
            y = in_blocks(lambda start: own._part(start // GROUP, BLOCK // GROUP)._product(x), padded)
        else:
            y = own._product(x)
        return y[:, : self._count]

    def times_each(self, x: Float[Array, "M I"], weights: Sequence[Weight]) -> list[Float[Array, "M _"]]:
        """See `Weight.times_each`."""
        if self._is_native(x) and all(isinstance(each, PackedInt4) for each in weights):
            return self._products(x, [self, *weights])
        return [each.times(x) for each in (self, *weights)]

    def _is_native(self, x: Float[Array, "M I"]) -> bool:
        """Whether C++ multiplies `x` with this matrix."""
        return len(x) <= NATIVE_ROWS and native.available()

    def _products(self, x: Float[Array, "M I"], weights: Sequence[PackedInt4]) -> list[Float[Array, "M _"]]:
        packed = [(each.nibbles, each.step, each.zero, each.unit) for each in weights]
        return native.products_int4(x.astype(jnp.float32), packed, [each._count for each in weights], self.layer)

    @property
    def _count(self) -> int:
        """Outputs of a product."""
        return math.prod(self.outputs) if self.inputs else self.outputs[0]

    def _arrays(self, each: Any) -> PackedInt4:
        arrays = (each(array) for array in (self.nibbles, self.step, self.zero, self.unit))
        return PackedInt4(*arrays, self.inputs, self.outputs)

    def _own(self) -> PackedInt4:
        """Without the stack of layers."""
        if self.layer is None:
            return self
        return self._arrays(partial(lax.dynamic_index_in_dim, index=self.layer, axis=0, keepdims=False))

    def _part(self, start: Array, count: int) -> PackedInt4:
        """Some of the blocks of outputs."""
        return self._arrays(partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=count))

    def _numbers(self, piece: slice) -> Float[Array, "*stack blocks 16 I"]:
        bits, step, zero = (array[..., piece] for array in (self.nibbles, self.step, self.zero))
        levels = jnp.concatenate([bits & 15, bits >> 4], axis=-2).astype(jnp.float32)
        levels = (levels - zero.astype(jnp.float32)[..., None, :] / ZERO_STEPS) * step.astype(jnp.float32)[..., None, :]
        return levels * self.unit[..., None]

    def _rows(self, index: Int[Array, "*shape"]) -> Float[Array, "*shape I"]:
        """Rows of a table."""
        block, row = index // GROUP, index % GROUP
        bits = self.nibbles[block, row % HALF]
        levels = jnp.where((row < HALF)[..., None], bits & 15, bits >> 4).astype(jnp.float32)
        levels -= self.zero[block].astype(jnp.float32) / ZERO_STEPS
        return levels * self.step[block].astype(jnp.float32) * self.unit[block, row][..., None]

    def _product(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        cpu = jax.default_backend() == "cpu"
        if cpu and len(x) <= FEW_ROWS:
            return few_rows(x, self._row_product)
        numbers = self._numbers(slice(None)).astype(x.dtype).reshape(-1, x.shape[1])
        return many_rows(x, numbers) if cpu else at_once(x, numbers)

    def _row_product(self, row: Float[Array, " I"]) -> Float[Array, " O"]:
        """The two halves of the bytes, and what the zero points take off, which is the same for all of a block."""

        def half(nibbles: Array, piece: slice) -> Array:
            levels = nibbles[..., piece].astype(jnp.float32) * self.step[:, None, piece].astype(jnp.float32)
            return levels.reshape(-1, levels.shape[-1])

        def zeros(piece: slice) -> Array:
            return self.step[:, piece].astype(jnp.float32) * self.zero[:, piece].astype(jnp.float32)

        halves = (row_product(row, partial(half, nibbles)) for nibbles in (self.nibbles & 15, self.nibbles >> 4))
        levels = jnp.concatenate([each.reshape(-1, HALF) for each in halves], axis=1)
        return ((levels - row_product(row, zeros)[:, None] / ZERO_STEPS) * self.unit).reshape(-1)


def pack_int4(rows: Float[Array, "*stack O I"], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> PackedInt4:
    """Rows in 4 bits, with steps and zero points that are fitted to them."""
    return PackedInt4(*_quantize(rows), inputs, outputs)


@jax.jit
def _quantize(rows: Float[Array, "*stack O I"]) -> tuple[Array, Array, Array, Array]:
    """`nibbles`, `step`, `zero` and `unit` of `PackedInt4`, block by block."""
    *stack, outputs, size = rows.shape
    blocks = -(-outputs // GROUP)
    rows = jnp.pad(rows, [*[(0, 0)] * len(stack), (0, blocks * GROUP - outputs), (0, 0)], mode="edge")
    found = lax.map(_quantize_block, rows.reshape(-1, GROUP, size))
    return tuple(array.reshape(*stack, blocks, *array.shape[1:]) for array in found)


def _quantize_block(block: Float[Array, "16 I"]) -> tuple[Array, Array, Array, Array]:
    """The levels of 16 outputs, each of which counts in its root mean square: groups share the step that remains.

    Steps and zero points are those of each group's range at first, then fitted to the levels by least squares.
    """
    block = block.astype(jnp.float32)
    rms = jnp.sqrt((block**2).mean(1))
    block /= jnp.where(rms == 0, 1, rms)[:, None]
    least, largest = jnp.minimum(block.min(0), 0), jnp.maximum(block.max(0), 0)
    step = (largest - least) / 15
    unit = step.max() / 255
    unit = jnp.where(unit == 0, 1, unit)
    step = jnp.clip(jnp.ceil(step / unit), 1, 255)
    zero = _zero_point(-least / (step * unit))
    best = _levels(block, step, zero, unit)
    for _ in range(REFITS):
        step, zero, levels, _ = best
        mean, spread = levels.mean(0), levels - levels.mean(0)
        slope = (spread * (block - block.mean(0))).sum(0) / jnp.maximum((spread**2).sum(0), 1e-9)
        step = jnp.where(slope > 0, jnp.clip(jnp.rint(slope / unit), 1, 255), step)
        new = _levels(block, step, _zero_point(mean - block.mean(0) / (step * unit)), unit)
        best = tuple(jnp.where(new[-1] < best[-1], *pair) for pair in zip(new, best, strict=True))
    step, zero, levels, _ = best
    levels = levels.astype(jnp.uint8)
    return levels[:HALF] | (levels[HALF:] << 4), step.astype(jnp.uint8), zero.astype(jnp.uint8), unit * rms


def _zero_point(zero: Float[Array, " I"]) -> Float[Array, " I"]:
    return jnp.clip(jnp.rint(zero * ZERO_STEPS), 0, 15 * ZERO_STEPS)


def _levels(
    block: Float[Array, "16 I"], step: Float[Array, " I"], zero: Float[Array, " I"], unit: Float[Array, ""]
) -> tuple[Array, Array, Array, Array]:
    """The step, the zero point, the levels 0 to 15 that come nearest to the weights, and the sum of squared errors."""
    levels = jnp.clip(jnp.rint(block / (step * unit) + zero / ZERO_STEPS), 0, 15)
    return step, zero, levels, (((levels - zero / ZERO_STEPS) * step * unit - block) ** 2).sum(0)
