"""The mesh in whose scope a function is traced, and how arrays and functions are split over it there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from polygpt.sharding.config import MESH_AXES, MeshConfig
from polygpt.sharding.mesh import make_mesh
from polygpt.sharding.rules import DEFAULT_RULES, Rules, batch_sharding, dividing, placement, sharding_of

Axes = tuple[str | None, ...]
Splits = Mapping[str, tuple[str, ...]]


class Scope(NamedTuple):
    """A mesh and the rules for it."""

    mesh: Mesh | AbstractMesh
    rules: Rules = DEFAULT_RULES

    @classmethod
    def of(cls, config: MeshConfig | None, devices: Sequence[jax.Device] | None = None) -> Scope | None:
        """The scope of a configuration; None for one device.

        Raises:
            RequestError: the mesh has another number of devices.
        """
        if config is None:
            return None
        scope = cls(make_mesh(config, devices), Rules.of(config))
        return scope if scope.mesh.size > 1 else None

    @property
    def replicated(self) -> NamedSharding:
        """Where an array goes that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Where an array goes whose first axis counts the rows of a batch."""
        return batch_sharding(self.mesh, self.rules)

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes that the rows of a batch are split over."""
        return tuple(name for name in dict(self.rules.activations)["batch"] if self.mesh.shape[name] > 1)

    @property
    def batch_devices(self) -> int:
        """How many parts the rows of a batch are split into."""
        return math.prod(self.mesh.shape[name] for name in self.batch_axes)

    @property
    def gathers(self) -> bool:
        """Whether parameters are split over devices that each have rows of their own, and so have to be gathered."""
        return any(set(names) & set(self.batch_axes) for axis, names in self.rules.parameters if axis != "expert")

    def placement(self, parameters: PyTree) -> PyTree:
        """Where each parameter goes, for a tree of what has `shape` and `axes`."""
        return placement(parameters, self.mesh, self.rules)

    def splits(self, **lengths: int) -> Splits:
        """For axes of activations, by name and length: the mesh axes, of more than one device, that each is split over.

        An axis that cannot be split evenly has fewer, or none.
        """
        table = dict(self.rules.activations)

        def of(axis: str, length: int) -> tuple[str, ...]:
            names = [name for name in table.get(axis, ()) if self.mesh.shape[name] > 1]
            return dividing(names, length, self.mesh.shape)

        return {axis: of(axis, length) for axis, length in lengths.items()}


# Part of the key of JAX's caches, so that a function traced outside is traced again inside.
_scope = jax.make_user_context(default_value=None)
# What the arrays are split over of which a device has its part only, within `sharded`.
_own = jax.make_user_context(default_value=())


@contextmanager
def use_mesh(mesh: Mesh | Scope | None, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Within it, `constrain` places activations on `mesh`; a mesh of one device, or None, changes nothing."""
    scope = mesh if isinstance(mesh, Scope) or mesh is None else Scope(mesh, rules)
    with _scope(None if scope is None or scope.mesh.size == 1 else scope):
        yield


def current_mesh() -> Scope | None:
    """The mesh in scope and its rules; None on one device."""
    return _scope.value


def whole_rows(rows: int) -> int:
    """The next number of rows, from `rows` on, that the mesh in scope splits evenly."""
    scope = current_mesh()
    return rows if scope is None else -(-rows // scope.batch_devices) * scope.batch_devices


def constrain(x: Array, *axes: str | None) -> Array:
    """`x`, an activation, placed by the logical names of its axes; `x` itself where no mesh is in scope."""
    scope = current_mesh()
    if scope is None:
        return x
    return lax.with_sharding_constraint(x, sharding_of(axes, x.shape, scope.mesh, scope.rules.activations))


def gathered(x: Array, axes: Axes) -> Array:
    """A parameter as products need it: whole along the mesh axes that the batch is split over.

    Its gradient is split again as the parameter is. Experts stay where they are: tokens are sent to them.
    """
    scope = current_mesh()
    if scope is None:
        return x
    stored = sharding_of(axes, x.shape, scope.mesh, scope.rules.parameters)
    batch = scope.batch_axes
    parts = [part if axis == "expert" else _without(part, batch) for axis, part in zip(axes, stored.spec, strict=True)]
    used = NamedSharding(scope.mesh, PartitionSpec(*parts))
    # The transpose of the first constraint splits the gradient, in the loop over layers where there is one.
    return lax.with_sharding_constraint(lax.with_sharding_constraint(x, stored), used)


def _without(part: str | tuple[str, ...] | None, names: tuple[str, ...]) -> tuple[str, ...] | None:
    own = (part,) if isinstance(part, str) else part or ()
    return tuple(name for name in own if name not in names) or None


def keeps_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of rematerialization: keep all that the gradient needs, but gather parameters again.

    Kept, the gathered parameters of all layers would be in memory at once. What only moves numbers is done again.
    """
    return primitive.name not in _MOVES


_MOVES = frozenset(
    {
        "sharding_constraint",
        "convert_element_type",
        "reshape",
        "transpose",
        "squeeze",
        "broadcast_in_dim",
        "dynamic_slice",
        "slice",
        "copy",
    }
)


def sharded(function: Callable, splits: Splits, in_axes: PyTree, out_axes: PyTree) -> Callable:
    """`function` run by every device on its own parts of the arrays; no mesh is in scope within it.

    Args:
        function: of the arrays that `in_axes` describes.
        splits: which mesh axes a logical axis is split over (`Scope.splits`).
        in_axes, out_axes: the logical axes of each array, in the structure of the arguments and results.
    """
    scope = current_mesh()

    def spec(axes: Axes) -> PartitionSpec:
        return PartitionSpec(*(splits.get(axis) or None for axis in axes))

    def specs(tree: PyTree) -> PyTree:
        return jax.tree.map(spec, tree, is_leaf=lambda leaf: isinstance(leaf, Leaf))

    def own(*arrays: Any) -> Any:
        with use_mesh(None), _own(tuple(splits.items())):
            return function(*arrays)

    named = {name for names in splits.values() for name in names}
    several = {name for name, size in scope.mesh.shape.items() if size > 1}
    return jax.shard_map(
        own,
        mesh=scope.mesh,
        axis_names=set(MESH_AXES) if named >= several else named,
        in_specs=specs(in_axes),
        out_specs=specs(out_axes),
        check_vma=False,
    )


class Leaf(tuple):
    """The logical axes of one array, as a leaf of a tree."""


def axes_of(*axes: str | None) -> Leaf:
    """The logical axes of one array."""
    return Leaf(axes)


def own_splits() -> dict[str, tuple[str, ...]]:
    """Within `sharded`, its `splits`; elsewhere nothing is split."""
    return dict(_own.value)


def device_index(names: tuple[str, ...]) -> Int[Array, ""] | int:
    """Which part of what is split over these mesh axes this device has, within `sharded`."""
    return lax.axis_index(names) if names else 0
