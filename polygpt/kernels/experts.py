"""Products of rows that were routed to experts, and the gathers that bring rows there and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def expert_matmul(
    x: Float[Array, "J R D"], weight: Float[Array, "E D F"], expert: Int[Array, " J"] | None
) -> Float[Array, "J R F"]:
    """x[j] @ weight[expert[j]] for every block j, in the dtype of x.

    `expert` is ascending; without it J = E, and block j is expert j's.
    """
    if x.shape[1] == 1 and expert is not None:  # a few rows: read (and cast) only the weights they need
        return jnp.einsum("jrd,jdf->jrf", x, weight[expert].astype(x.dtype))
    if jax.default_backend() == "cpu":
        return _looped_matmul(x, weight, jnp.arange(x.shape[0]) if expert is None else expert)
    weight = weight.astype(x.dtype)
    if expert is None:
        return jnp.einsum("erd,edf->erf", x, weight)
    sizes = jnp.bincount(expert, length=weight.shape[0]) * x.shape[1]
    flat = lax.ragged_dot(x.reshape(-1, x.shape[-1]), weight, sizes.astype(jnp.int32))
    return flat.reshape(*x.shape[:2], -1)


@jax.custom_vjp
def _looped_matmul(
    x: Float[Array, "J R D"], weight: Float[Array, "E D F"], expert: Int[Array, " J"]
) -> Float[Array, "J R F"]:
    """One product after the other, each on all cores: a CPU runs a batched product on one, and a ragged one E times."""
    return lax.map(lambda block: block[0] @ weight[block[1]].astype(x.dtype), (x, expert))


def _looped_forward(x: Array, weight: Array, expert: Array) -> tuple[Array, tuple]:
    return _looped_matmul(x, weight, expert), (x, weight, expert)


def _looped_backward(saved: tuple, d_y: Float[Array, "J R F"]) -> tuple[Array, Array, None]:
    x, weight, expert = saved

    def one(d_weight: Array, block: tuple) -> tuple[Array, Array]:
        x, index, d_y = block
        return d_weight.at[index].add((x.T @ d_y).astype(weight.dtype)), d_y @ weight[index].astype(x.dtype).T

    d_weight, d_x = lax.scan(one, jnp.zeros_like(weight), (x, expert, d_y))
    return d_x, d_weight, None


_looped_matmul.defvjp(_looped_forward, _looped_backward)


@jax.custom_vjp
def take_rows(x: Float[Array, "M D"], index: Int[Array, " R"], readers: Int[Array, "M c"]) -> Float[Array, "R D"]:
    """x[index], zeros where the index is beyond x. `readers` lists which results read each row of x (or beyond R).

    The gradient is a gather by `readers`; as a scatter it would be many times slower on a CPU.
    """
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _take_forward(x: Array, index: Array, readers: Array) -> tuple[Array, Array]:
    return take_rows(x, index, readers), readers


def _take_backward(readers: Int[Array, "M c"], d_y: Float[Array, "R D"]) -> tuple[Array, None, None]:
    return jnp.take(d_y, readers, axis=0, mode="fill", fill_value=0).sum(1), None, None


take_rows.defvjp(_take_forward, _take_backward)
