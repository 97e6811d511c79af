"""Whether a model fits a mesh: what is refused, and what every device holds whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from polygpt.errors import RequestError, suggest
from polygpt.sharding.rules import ACTIVATION_RULES, PARAMETER_RULES, Replicated, replicated_axes
from polygpt.sharding.scope import Scope

# Axes that a mesh axis is chosen for, and the setting that gives their length. Others are replicated if need be.
_REQUIRED = {"heads": "attention.num_heads", "expert": "feedforward.num_experts"}


def check_fit(parameters: PyTree, scope: Scope) -> list[str]:
    """What every device of the mesh holds whole since it cannot be split evenly, a line for each logical axis.

    Raises:
        RequestError: heads or experts cannot be split evenly; the numbers are named, and those that would do. Or a
            changed rule is for an axis that no parameter has, or splits an activation twice over one mesh axis.
    """
    unknown = _check_rules(parameters, scope)
    found = replicated_axes(parameters, scope.mesh, scope.rules)
    for each in found:
        if each.axis in _REQUIRED:
            raise RequestError(_refusal(each))
    return [*unknown, *_notes(found)]


def _check_rules(parameters: PyTree, scope: Scope) -> list[str]:
    """Refuses rules for axes that no parameter has; a line for each rule for an activation's axis that is not known.

    A part of one's own may give its activations axes of any name.
    """
    named = {axis for info in jax.tree.leaves(parameters) for axis in info.axes if axis is not None}
    known = {*PARAMETER_RULES, *named}
    for axis, _ in scope.rules.parameters:
        if axis in ACTIVATION_RULES and axis not in known:
            raise RequestError(f"mesh.rules.{axis}: only activations have this axis; use mesh.activation_rules.{axis}")
        if axis not in known:
            raise RequestError(
                f"mesh.rules.{axis}: no parameter of this model has such an axis; {suggest(axis, known)}"
            )
    for axis, names in scope.rules.activations:
        both = [name for name in names if name in scope.batch_axes]
        if both and axis in ACTIVATION_RULES and axis not in ("batch", "expert"):  # tokens leave their rows for experts
            raise RequestError(
                f"mesh.activation_rules: {axis} cannot be split over '{both[0]}', which the rows of the batch are; "
                f"leave it out of mesh.activation_rules.{axis} or of mesh.activation_rules.batch"
            )
    known |= ACTIVATION_RULES.keys()
    others = [axis for axis, _ in scope.rules.activations if axis not in known]
    return [
        f"activation_rules.{axis} changes nothing unless a part of your own names this axis; {suggest(axis, known)}"
        for axis in others
    ]


def _notes(found: Sequence[Replicated]) -> list[str]:
    """A line for each logical axis."""
    by_axis: dict[tuple[str, int], list[Replicated]] = {}
    for each in found:
        by_axis.setdefault((each.axis, each.length), []).append(each)
    return [_note(*axis, entries) for axis, entries in by_axis.items()]


def replication(parameters: PyTree, scope: Scope) -> list[str]:
    """What every device of the mesh holds whole: what cannot be split evenly, and what a changed rule keeps whole.

    Where `check_fit` would refuse the mesh, the first lines say why.

    Raises:
        RequestError: a changed rule is for an axis that no parameter has, or splits an activation twice over one axis.
    """
    unknown = _check_rules(parameters, scope)
    changed = dict(scope.rules.parameters)
    lengths = {
        axis: length
        for info in jax.tree.leaves(parameters)
        for axis, length in zip(info.axes, info.shape, strict=True)
        if not changed.get(axis) and any(scope.mesh.shape[name] > 1 for name in PARAMETER_RULES.get(axis, ()))
    }
    kept = [f"{axis} ({length}) stay whole on every device (mesh.rules)" for axis, length in lengths.items()]
    found = replicated_axes(parameters, scope.mesh, scope.rules)
    refused = {each.axis: f"cannot be trained: {_refusal(each)}" for each in found if each.axis in _REQUIRED}
    return [*refused.values(), *unknown, *kept, *_notes([each for each in found if each.axis not in _REQUIRED])]


def check_rows(rows: int, scope: Scope, setting: str) -> None:
    """Refuses a batch whose rows cannot be split evenly; `setting` gives their number.

    Raises:
        RequestError: names the numbers, and those that would do.
    """
    devices = scope.batch_devices
    if rows % devices:
        down, up = rows // devices * devices, -(-rows // devices) * devices
        fitting = " or ".join(str(count) for count in (down, up) if count)
        axes = " × ".join(f"{name} {scope.mesh.shape[name]}" for name in scope.batch_axes)
        raise RequestError(
            f"{setting}: {rows} rows cannot be split evenly over {devices} devices (mesh: {axes}); {fitting} can"
        )


def _refusal(each: Replicated) -> str:
    wanted = " × ".join(f"mesh.{name}" for name in each.mesh_axes)
    fitting = [str(count) for count in range(1, each.length + 1) if each.length % count == 0]
    several = f"{', '.join(fitting[:-1])} or {fitting[-1]}" if len(fitting) > 1 else fitting[0]
    whole = f"mesh.rules.{each.axis}= (empty) keeps all of them on every device"
    return (
        f"{wanted}={each.devices} does not divide the {each.length} {each.axis.rstrip('s')}s of {each.parameter} "
        f"({_REQUIRED[each.axis]}); {wanted} can be {several}, or {whole}"
    )


def _note(axis: str, length: int, found: Sequence[Replicated]) -> str:
    names = [each.parameter for each in found]
    first = found[0]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    split = " × ".join(first.mesh_axes)
    return (
        f"{axis} ({length}) cannot be split evenly over {split} {first.devices}: {names[0]}{more} replicated along it"
    )


def bytes_per_device(parameters: PyTree, scope: Scope) -> int:
    """Bytes of the parameters that one device holds."""

    def own(info: Any, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(info.shape)) * info.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(own, parameters, scope.placement(parameters))))
