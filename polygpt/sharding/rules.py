"""The two tables from logical axes to mesh axes, and where an array goes by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from polygpt.errors import RequestError
from polygpt.sharding.config import MESH_AXES, MeshConfig

# Logical axis -> mesh axes, outermost first. An axis that is not listed is not split.
PARAMETER_RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
}
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
}
Table = tuple[tuple[str, tuple[str, ...]], ...]


class Rules(NamedTuple):
    """Both tables, hashable."""

    parameters: Table = tuple(PARAMETER_RULES.items())
    activations: Table = tuple(ACTIVATION_RULES.items())

    @classmethod
    def of(cls, config: MeshConfig | None) -> Rules:
        """The default tables with the changes of a configuration."""
        if config is None:
            return cls()
        return cls(
            tuple({**PARAMETER_RULES, **config.rules}.items()),
            tuple({**ACTIVATION_RULES, **config.activation_rules}.items()),
        )


DEFAULT_RULES = Rules()


class Replicated(NamedTuple):
    """An axis that every device holds whole, because its length cannot be split evenly over a mesh axis.

    Attributes:
        parameter: the path of the parameter.
        axis: its logical axis.
        length: of that axis.
        mesh_axes, devices: what the rules say that it is split over.
    """

    parameter: str
    axis: str
    length: int
    mesh_axes: tuple[str, ...]
    devices: int


def sharding_of(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, table: Table = DEFAULT_RULES.parameters
) -> NamedSharding:
    """The placement on `mesh` of an array whose axes have these logical names.

    Where two of them would be split over the same mesh axis (an expert's hidden units), the first is. An axis that
    cannot be split evenly is split over the first of its mesh axes that divide it, or not at all.
    """
    rules, used, spec = dict(table), set(), []
    for axis, length in zip(axes, shape, strict=True):
        split = dividing([name for name in rules.get(axis, ()) if name not in used], length, mesh.shape)
        used.update(split)
        spec.append(split[0] if len(split) == 1 else split or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def dividing(names: Sequence[str], length: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The first of `names` whose devices, together, divide `length`."""
    chosen: list[str] = []
    for name in names:
        if length % math.prod(sizes[own] for own in [*chosen, name]):
            break
        chosen.append(name)
    return tuple(chosen)


def placement(parameters: PyTree, mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES) -> PyTree:
    """Where each parameter goes on `mesh`, for a tree of what has `shape` and `axes`; see `sharding_of`.

    Raises:
        RequestError: the mesh has other axes.
    """
    check_axes(mesh)
    return jax.tree.map(lambda info: sharding_of(info.axes, info.shape, mesh, rules.parameters), parameters)


def replicated_axes(parameters: PyTree, mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES) -> list[Replicated]:
    """The axes of parameters that the rules would split over `mesh` if that were possible evenly."""
    table, found = dict(rules.parameters), []

    def look(path: tuple, info: Any) -> None:
        for axis, length in zip(info.axes, info.shape, strict=True):
            names = tuple(name for name in table.get(axis, ()) if mesh.shape[name] > 1)
            devices = math.prod(mesh.shape[name] for name in names)
            if length % devices:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                found.append(Replicated(name, axis, length, names, devices))

    jax.tree_util.tree_map_with_path(look, parameters)
    return found


def batch_sharding(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> NamedSharding:
    """Where an array goes whose first axis counts the rows of a batch."""
    axes = dict(rules.activations)["batch"]
    return NamedSharding(mesh, PartitionSpec(axes))


def check_axes(mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh of other axes.

    Raises:
        RequestError: it has others.
    """
    if mesh.axis_names != MESH_AXES:
        raise RequestError(f"the mesh has the axes {mesh.axis_names}; they must be {MESH_AXES} (see make_mesh)")
