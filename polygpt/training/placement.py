"""Where the arrays of a training state go on a mesh: what belongs to a parameter goes where the parameter goes."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from polygpt.model import ParameterInfo
from polygpt.sharding import Scope

Path = tuple[str, ...]


def optimizer_placement(state: PyTree, parameters: dict[str, Any], scope: Scope) -> PyTree:
    """Where each array of an optimizer's state goes, for the shapes of the state.

    An array that belongs to a parameter (whose path is part of its own) is split as the parameter is: moments, and the
    rows' and columns' means of a matrix. All others, such as counters, are replicated.
    """
    infos = {tuple(map(str, path)): info for path, info in flatten_dict(parameters).items()}
    placed = {tuple(map(str, path)): sharding for path, sharding in flatten_dict(scope.placement(parameters)).items()}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        own = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        found = _contained(own, infos)
        spec = None if found is None else _like_parameter(leaf.shape, infos[found], placed[found].spec)
        return scope.replicated if spec is None else _even(NamedSharding(scope.mesh, spec), leaf.shape)

    return jax.tree.map_with_path(place, state)


def _contained(path: Path, infos: dict[Path, ParameterInfo]) -> Path | None:
    """The parameter whose path is a part of `path`."""
    for start in range(len(path)):
        for stop in range(len(path), start, -1):
            if path[start:stop] in infos:
                return path[start:stop]
    return None


def _like_parameter(shape: tuple[int, ...], info: ParameterInfo, spec: PartitionSpec) -> PartitionSpec | None:
    """How an array of `shape` is split that belongs to a parameter; None if it has nothing of the parameter's shape.

    Adafactor takes each matrix by itself, [stack, inputs, outputs]: a side of several axes is split as its first one.
    """
    if shape == info.shape:
        return spec
    if shape == (1, *info.shape):
        return PartitionSpec(None, *spec)
    if not info.inputs:
        return None
    inputs, outputs = map(math.prod, info.sides)
    first = {"in": spec[info.stack], "out": spec[info.stack + info.inputs]}
    stack = math.prod(info.shape[: info.stack])
    return {
        (stack, inputs, outputs): PartitionSpec(None, first["in"], first["out"]),
        (stack, inputs): PartitionSpec(None, first["in"]),
        (stack, outputs): PartitionSpec(None, first["out"]),
    }.get(shape)


def _even(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`sharding` if it splits `shape` evenly; otherwise everything is replicated."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding
