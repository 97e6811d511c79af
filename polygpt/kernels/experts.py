"""Products of rows that were routed to experts, and what brings rows there and back, between devices as well."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from polygpt.sharding import device_index, own_splits


def expert_matmul(
    x: Float[Array, "J R D"], weight: Float[Array, "E D F"], expert: Int[Array, " J"] | None
) -> Float[Array, "J R F"]:
    """x[j] @ weight[expert[j]] for every block j, in the dtype of x.

    `expert` is ascending; without it J = E, and block j is expert j's. Where experts are split over devices, a block of
    expert E is not used.
    """
    if x.shape[1] == 1 and expert is not None:  # a few rows: read (and cast) only the weights they need
        return jnp.einsum("jrd,jdf->jrf", x, weight[expert].astype(x.dtype))
    if jax.default_backend() == "cpu":
        unused = expert is not None and bool(own_splits().get("expert"))
        return _looped_matmul(x, weight, jnp.arange(x.shape[0]) if expert is None else expert, unused)
    weight = weight.astype(x.dtype)
    if expert is None:
        return jnp.einsum("erd,edf->erf", x, weight)
    sizes = jnp.bincount(expert, length=weight.shape[0]) * x.shape[1]
    flat = lax.ragged_dot(x.reshape(-1, x.shape[-1]), weight, sizes.astype(jnp.int32))
    return flat.reshape(*x.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _looped_matmul(
    x: Float[Array, "J R D"], weight: Float[Array, "E D F"], expert: Int[Array, " J"], unused: bool
) -> Float[Array, "J R F"]:
    """One product after the other, each on all cores: a CPU runs a batched product on one, and a ragged one E times.

    `unused`: there may be blocks of expert E, which are skipped.
    """

    def product(x: Array, index: Array) -> Array:
        return x @ weight[index].astype(x.dtype)

    def one(block: tuple[Array, Array]) -> Array:
        x, index = block
        if not unused:
            return product(x, index)
        nothing = jnp.zeros((x.shape[0], weight.shape[2]), x.dtype)
        return lax.cond(index < weight.shape[0], product, lambda x, index: nothing, x, index)

    return lax.map(one, (x, expert))


def _looped_forward(x: Array, weight: Array, expert: Array, unused: bool) -> tuple[Array, tuple]:
    return _looped_matmul(x, weight, expert, unused), (x, weight, expert)


def _looped_backward(unused: bool, saved: tuple, d_y: Float[Array, "J R F"]) -> tuple[Array, Array, None]:
    x, weight, expert = saved

    def one(d_weight: Array, block: tuple) -> tuple[Array, Array]:
        x, index, d_y = block
        return d_weight.at[index].add((x.T @ d_y).astype(weight.dtype)), d_y @ weight[index].astype(x.dtype).T

    def if_used(d_weight: Array, block: tuple) -> tuple[Array, Array]:
        nothing = jnp.zeros_like(block[0])
        return lax.cond(block[1] < weight.shape[0], one, lambda total, _: (total, nothing), d_weight, block)

    d_weight, d_x = lax.scan(if_used if unused else one, jnp.zeros_like(weight), (x, expert, d_y))
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


# --- On a mesh, within `sharded` ------------------------------------------------------------------------


def mean_over_devices(x: Array) -> Array:
    """The mean of a device's own mean over its rows and those of all others."""
    axes = own_splits().get("batch")
    return lax.pmean(x, axes) if axes else x


def send_to_experts(rows: Float[Array, "E R D"]) -> Float[Array, "E_own R_all D"]:
    """Each expert's rows, from every device to the one that has the expert."""
    axes = own_splits().get("expert")
    return lax.all_to_all(rows, axes, 0, 1, tiled=True) if axes else rows


def send_back(rows: Float[Array, "E_own R_all D"]) -> Float[Array, "E R D"]:
    """What `send_to_experts` sent, back to where it came from."""
    axes = own_splits().get("expert")
    return lax.all_to_all(rows, axes, 1, 0, tiled=True) if axes else rows


def from_peers(tokens: PyTree) -> PyTree:
    """The tokens of all devices among which the experts are split, along the first axis."""
    axes = own_splits().get("expert")
    return jax.tree.map(lambda x: lax.all_gather(x, axes, tiled=True), tokens) if axes else tokens


def to_peers(outputs: Float[Array, "M_all D"]) -> Float[Array, "M D"]:
    """The sum over devices of what their experts add to the tokens of `from_peers`, each device's own tokens."""
    axes = own_splits().get("expert")
    return lax.psum_scatter(outputs, axes, tiled=True) if axes else outputs


def first_own_expert(own: int) -> Int[Array, ""] | int:
    """The number of this device's first expert, where each has `own`."""
    return device_index(own_splits().get("expert", ())) * own
