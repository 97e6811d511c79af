"""The mesh in whose scope a function is traced, and the constraints that its activations are put under there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array

from polygpt.sharding.rules import DEFAULT_RULES, Rules, sharding_of


class Scope(NamedTuple):
    """A mesh and the rules for it."""

    mesh: Mesh | AbstractMesh
    rules: Rules


# Part of the key of JAX's caches, so that a function traced outside is traced again inside.
_scope = jax.make_user_context(default_value=None)


@contextmanager
def use_mesh(mesh: Mesh | None, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Within it, `constrain` places activations on `mesh`; a mesh of one device, or None, changes nothing."""
    with _scope(None if mesh is None or mesh.size == 1 else Scope(mesh, rules)):
        yield


def current_mesh() -> Scope | None:
    """The mesh in scope and its rules; None on one device."""
    return _scope.value


def constrain(x: Array, *axes: str | None) -> Array:
    """`x`, an activation, placed by the logical names of its axes; `x` itself where no mesh is in scope."""
    scope = current_mesh()
    if scope is None:
        return x
    return lax.with_sharding_constraint(x, sharding_of(axes, x.shape, scope.mesh, scope.rules.activations))


def gathered(x: Array, axes: tuple[str | None, ...]) -> Array:
    """A parameter as products need it: whole along the mesh axes that the batch is split over.

    Its gradient is put back where the parameter is. Experts stay where they are: tokens are sent to them.
    """
    scope = current_mesh()
    if scope is None:
        return x
    stored = sharding_of(axes, x.shape, scope.mesh, scope.rules.parameters)
    batch = dict(scope.rules.activations)["batch"]
    spec = [part if axis == "expert" else _without(part, batch) for axis, part in zip(axes, stored.spec, strict=True)]
    used = NamedSharding(scope.mesh, jax.sharding.PartitionSpec(*spec))
    return x if used.spec == stored.spec else _moved(x, used, stored)


def _without(part: str | tuple[str, ...] | None, names: tuple[str, ...]) -> tuple[str, ...] | None:
    own = (part,) if isinstance(part, str) else part or ()
    return tuple(name for name in own if name not in names) or None


def _moved(x: Array, there: NamedSharding, back: NamedSharding) -> Array:
    """`x` placed `there`, its gradient `back`."""

    @jax.custom_vjp
    def move(x: Array) -> Array:
        return lax.with_sharding_constraint(x, there)

    move.defvjp(lambda x: (move(x), None), lambda _, d_x: (lax.with_sharding_constraint(d_x, back),))
    return move(x)
