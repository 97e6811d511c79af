"""Products with weights, whatever form they are kept in: plain arrays, or something that multiplies by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@runtime_checkable
class Weight(Protocol):
    """A weight that is not a plain array: packed, say.

    Attributes:
        outputs: the axes that remain after a product.
    """

    outputs: tuple[int, ...]

    def __getitem__(self, index: Any) -> Float[Array, "..."]:
        """The numbers, indexed as the plain parameter would be."""
        ...

    def times(self, x: Float[Array, "M I"], *, in_loop: bool = False) -> Float[Array, "M O"]:
        """`x` times the matrix (a table: its transpose), accumulated in float32; float32 [M, O].

        `in_loop`: a loop may come back to this very matrix, as decoding does to the head's.
        """
        ...

    def times_each(self, x: Float[Array, "M I"], weights: Sequence[Weight]) -> list[Float[Array, "M _"]]:
        """`times` of this matrix and of each of `weights`, which are the same layer's and contract the same inputs."""
        ...


def matmuls(x: Float[Array, "B T ..."], weights: Sequence[Array | Weight], inputs: int = 1) -> list[Array]:
    """Contracts the trailing axes of `x` with the first `inputs` axes of each weight, in the dtype of `x`.

    The product is taken over flat tokens, [B·T, inputs] @ [inputs, outputs]: on a CPU the gradient of the
    three-dimensional form runs at half the speed, because XLA transposes operands of a contraction over two axes.
    """
    flat = x.reshape(x.shape[0] * x.shape[1], -1)
    if all(isinstance(weight, Weight) for weight in weights):
        shapes = [weight.outputs for weight in weights]
        found = weights[0].times_each(flat, weights[1:])
    else:
        shapes = [weight.shape[inputs:] for weight in weights]
        matrices = (weight.astype(x.dtype).reshape(math.prod(weight.shape[:inputs]), -1) for weight in weights)
        found = [_product(flat, matrix) for matrix in matrices]
    return [y.astype(x.dtype).reshape(*x.shape[:2], *shape) for y, shape in zip(found, shapes, strict=True)]


@jax.custom_vjp
def _product(x: Float[Array, "M I"], weight: Float[Array, "I O"]) -> Float[Array, "M O"]:
    return x @ weight


_product.defvjp(
    lambda x, weight: (x @ weight, (x, weight)),
    lambda saved, d_y: (d_y @ saved[1].T, weight_gradient(saved[0], d_y)),
)


def weight_gradient(
    x: Float[Array, "M I"], d_y: Float[Array, "M O"], dtype: DTypeLike | None = None
) -> Float[Array, "I O"]:
    """x.T @ d_y, accumulated in `dtype` or else in that of `x`.

    XLA's fast library for CPUs takes no product whose left side is transposed. With the smaller side transposed in
    memory before (the barriers keep XLA from folding that into the product) two cores reach 163 to 191 GFLOP/s in
    float32; without it 74 to 153.
    """
    if jax.default_backend() != "cpu":
        return jnp.matmul(x.T, d_y, preferred_element_type=dtype)
    if x.shape[1] > d_y.shape[1]:
        return lax.optimization_barrier(weight_gradient(d_y, x, dtype)).T
    return jnp.matmul(lax.optimization_barrier(x.T), d_y, preferred_element_type=dtype)


def project_to_vocabulary(
    hidden: Float[Array, "... D"], weight: Array | Weight, transposed: bool = False
) -> Float[Array, "... V"]:
    """float32 products with the head's matrix [D, V], or, `transposed`, with an embedding table [V, D].

    Taken in the compute dtype over flat tokens, accumulated in float32.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if isinstance(weight, Weight):
        products = weight.times(flat, in_loop=True)
    else:
        matrix = (weight.T if transposed else weight).astype(hidden.dtype)
        products = jnp.matmul(flat, matrix, preferred_element_type=jnp.float32)
    return products.reshape(*hidden.shape[:-1], -1)
