"""Which parameters an optimizer trains, and the learning rate and weight decay of each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int, PyTree
from pydantic import Field

from polygpt.config import Config
from polygpt.errors import RequestError
from polygpt.model import ParameterInfo, Params


class GroupConfig(Config):
    """Training settings of the parameters that match a pattern; a parameter is in the first group that it matches.

    Attributes:
        match: a pattern of the shell for the parameters' dotted names, such as `blocks.*.attention.*`; `*` also matches
            dots.
        learning_rate: their learning rate is multiplied by this; 0 freezes them, and they have no optimizer state.
        weight_decay: of these parameters, vectors and embeddings included, in place of the optimizer's; None leaves it.
    """

    match: Annotated[str, Field(min_length=1)]
    learning_rate: Annotated[float, Field(ge=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] | None = None


class _Count(NamedTuple):
    count: Int[Array, ""]


class ParameterGroups:
    """The parameters of a model that an optimizer trains.

    Left out are those that no gradient moves (a balance bias) and those that a group freezes: an optimizer sees neither
    them nor their gradients.

    Attributes:
        infos: a `ParameterInfo` for each trained parameter, nested as the parameters are.

    Raises:
        RequestError: a pattern matches nothing, or everything is frozen.
    """

    def __init__(self, parameters: dict[str, Any], groups: Sequence[GroupConfig] = ()):
        flat = flatten_dict(parameters)
        assigned = _assign(list(flat), groups)
        self._groups = {path: group for path, group in assigned.items() if group.learning_rate > 0}
        self.frozen = frozenset(path for path in flat if path not in self._groups)
        self.infos = unflatten_dict(
            {path: info for path, info in flat.items() if path in self._groups and info.trained}
        )
        if not self.infos:
            raise RequestError(
                "training.groups: every parameter is frozen (learning_rate: 0); leave some to be trained"
            )

    def select(self, tree: PyTree) -> PyTree:
        """The part of a tree like the model's parameters that belongs to the trained ones."""
        flat, trained = flatten_dict(tree), flatten_dict(self.infos)
        return unflatten_dict({path: flat[path] for path in trained})

    def replace(self, tree: PyTree, trained: PyTree) -> PyTree:
        """`tree` with the values of the trained parameters taken from `trained`."""
        return unflatten_dict({**flatten_dict(tree), **flatten_dict(trained)})

    def freeze(self, tree: PyTree, frozen: PyTree) -> PyTree:
        """`tree` with the values of the frozen parameters taken from `frozen`."""
        if not self.frozen:
            return tree
        values = flatten_dict(frozen)
        return unflatten_dict({**flatten_dict(tree), **{path: values[path] for path in self.frozen}})

    def decay(
        self, weight_decay: float, where: Callable[[ParameterInfo], bool] = lambda info: info.inputs is not None
    ) -> optax.GradientTransformation:
        """Adds weight decay: `weight_decay` where `where` says so (by default matrices), or the group's own."""

        def own(path: tuple, info: ParameterInfo) -> float:
            value = self._groups[path].weight_decay
            return value if value is not None else weight_decay * where(info)

        strengths = self._map(own)

        def update(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
            return jax.tree.map(lambda s, u, p: u + s * p if s else u, strengths, updates, params), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    def descend(
        self, learning_rate: optax.Schedule, ratio: Callable[[ParameterInfo], float] = lambda info: 1.0
    ) -> optax.GradientTransformation:
        """Multiplies by minus the learning rate: that of the step, times `ratio` and the group's multiplier."""
        factors = self._map(lambda path, info: ratio(info) * self._groups[path].learning_rate)

        def update(updates: PyTree, state: _Count, params: PyTree | None = None) -> tuple[PyTree, _Count]:
            rate = learning_rate(state.count)
            updates = jax.tree.map(
                lambda f, u: jnp.asarray(-rate if f == 1 else -rate * f, u.dtype) * u, factors, updates
            )
            return updates, _Count(optax.safe_increment(state.count))

        return optax.GradientTransformation(lambda params: _Count(jnp.zeros((), jnp.int32)), update)

    def _map(self, function: Callable[[tuple, ParameterInfo], float]) -> dict[str, Any]:
        return unflatten_dict({path: function(path, info) for path, info in flatten_dict(self.infos).items()})


def keep_trained(optimizer: optax.GradientTransformation, groups: ParameterGroups) -> optax.GradientTransformation:
    """`optimizer` for the trained parameters; the updates of all others are 0."""

    def update(gradients: Params, state: PyTree, params: Params) -> tuple[Params, PyTree]:
        updates, state = optimizer.update(groups.select(gradients), state, groups.select(params))
        return groups.replace(jax.tree.map(jnp.zeros_like, params), updates), state

    return optax.GradientTransformation(lambda params: optimizer.init(groups.select(params)), update)


def _assign(paths: list[tuple], groups: Sequence[GroupConfig]) -> dict[tuple, GroupConfig]:
    """The group of each parameter.

    Raises:
        RequestError: a group would have no parameter; the nearest names are given.
    """
    names = {path: ".".join(map(str, path)) for path in paths}
    assigned: dict[tuple, GroupConfig] = {}
    for index, group in enumerate(groups):
        matched = [path for path in paths if fnmatchcase(names[path], group.match)]
        key = f"training.groups.{index}.match"
        if not matched:
            near = difflib.get_close_matches(group.match, names.values(), n=3, cutoff=0.0)
            raise RequestError(f"{key}: '{group.match}' matches no parameter; the nearest are {', '.join(near)}")
        new = {path: group for path in matched if path not in assigned}
        if not new:
            raise RequestError(f"{key}: all that '{group.match}' matches is in an earlier group; put this one first")
        assigned |= new
    rest = GroupConfig(match="*")
    return {path: assigned.get(path, rest) for path in paths}
