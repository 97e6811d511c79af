"""Packs parameters: what is stored in which form, by the type of the weights."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from polygpt.errors import RequestError
from polygpt.kernels.int4 import PackedInt4, pack_int4
from polygpt.kernels.packed import Packed

WeightType = Literal["float32", "bfloat16", "float16", "int8", "int4"]
WEIGHT_TYPES: tuple[WeightType, ...] = get_args(WeightType)
# Their weights are chosen among 16 or 256 values, from float32.
QUANTIZED: tuple[WeightType, ...] = ("int8", "int4")
ALIGNMENT = 64  # bytes: XLA uses NumPy's memory without a copy only if it is aligned so


def check_weight_type(dtype: str) -> None:
    """Refuses what weights cannot be packed in.

    Raises:
        RequestError: there is no such type.
    """
    if dtype not in WEIGHT_TYPES:
        raise RequestError(f"no weights of type '{dtype}'; there are {', '.join(WEIGHT_TYPES)}")


def pack(
    values: Array | np.ndarray, inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: WeightType
) -> Packed | PackedInt4:
    """The packed form of a parameter.

    Args:
        values: [*stack, *inputs, *outputs]; a table [rows, width].
        inputs: the axes that are contracted; none of a table.
        outputs: those that remain.
        dtype: int8 has 127 steps on each side of 0, up to the largest weight of each output (a table: of each row);
            int4 has 16 values from the least to the largest weight of a group (see `PackedInt4`).
    """
    own = np.asarray(values)
    if inputs:
        stack = own.shape[: own.ndim - len(inputs) - len(outputs)]
        own = own.reshape(*stack, math.prod(inputs), math.prod(outputs)).swapaxes(-1, -2)
    return pack_rows(own, inputs, outputs, dtype)


def pack_rows(
    rows: np.ndarray, inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: WeightType, device: Any = None
) -> Packed | PackedInt4:
    """The packed form of a parameter that is already stored [*stack, O, I]. Aligned memory is used without a copy."""
    if dtype == "int4":
        return pack_int4(jax.device_put(rows, device, may_alias=True), inputs, outputs)
    if dtype == "int8":
        steps, scale = _quantize(jax.device_put(rows, device, may_alias=True))
        return Packed(steps, scale, inputs, outputs, dtype)
    numbers = rows.astype(jnp.dtype(dtype), copy=False)
    bits = numbers.view(np.uint16) if numbers.itemsize == 2 else numbers
    # JAX transposes a matrix on its way to the device faster than NumPy or XLA (25, 67 and 200 ms for 27 M numbers).
    own = jax.device_put(bits, device, may_alias=True)
    return Packed(own, None, inputs, outputs, dtype)


@jax.jit
def _quantize(matrix: Float[Array, "*stack O I"]) -> tuple[Int8[Array, "*stack O I"], Float[Array, "*stack O"]]:
    """Each weight rounded to one of 255 steps, and the size of a step for each output."""
    matrix = matrix.astype(jnp.float32)
    largest = jnp.abs(matrix).max(-1)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return jnp.rint(matrix / scale[..., None]).astype(jnp.int8), scale
