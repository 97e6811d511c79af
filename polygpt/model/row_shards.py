"""Feed-forwards with experts on a mesh: every device serves its own rows, and sends them to where the experts are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, PyTree

from polygpt.model.parts import Context, Effects
from polygpt.sharding import axes_of, current_mesh, sharded


def sharded_over_rows(
    method: Callable[..., tuple[Float[Array, "B T D"], Effects]],
    module: Any,
    x: Float[Array, "B T D"],
    context: Context,
    rows: PyTree = None,
) -> tuple[Float[Array, "B T D"], Effects]:
    """`method(module, x, context, rows)`, by every device of the mesh in scope for its own rows.

    Of the module a device then has its own experts alone. What is computed over all rows is averaged by
    `kernels.mean_over_devices`, and `kernels.experts` sends rows to experts.

    Args:
        method: of the module; `rows` are further arrays whose first axis is that of the rows.
        module: says in `config.num_experts` how many experts it has, and in `per_expert` which of its parameters
            have a first axis that counts them, over which they are split.
        x, context, rows: of all rows.
    """
    scope = current_mesh()
    splits = {} if scope is None else scope.splits(batch=x.shape[0], expert=module.config.num_experts)
    if not any(splits.values()):
        return method(module, x, context, rows)
    graph, state = nnx.split(module)
    parameters = dict(nnx.to_flat_state(state))

    def expert_axis(path: tuple) -> Any:
        return axes_of("expert") if path[0] in module.per_expert else axes_of()

    def own(values: dict, x: Array, by_row: PyTree, whole: PyTree) -> tuple[Array, Effects]:
        (positions, segment_ids, valid, rows), (key, loads) = by_row, whole
        given = {"positions": positions, "segment_ids": segment_ids, "valid": valid, "key": key, "loads": loads}
        given["capture"] = {}  # nobody looks into a model that is spread over devices
        return method(nnx.merge(graph, unflatten_dict(values)), x, dataclasses.replace(context, **given), rows)

    by_row = (context.positions, context.segment_ids, context.valid, rows)
    whole = (context.key, context.loads)
    batch = axes_of("batch")
    in_axes = (
        {path: expert_axis(path) for path in parameters},
        batch,
        jax.tree.map(lambda _: batch, by_row),
        jax.tree.map(lambda _: axes_of(), whole),
    )
    values = {path: parameter.get_value() for path, parameter in parameters.items()}
    return sharded(own, splits, in_axes, (batch, axes_of()))(values, x, by_row, whole)
