"""The search for a layout that fits: other meshes of as many devices, parts of the batch, rematerialisation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from polygpt.planning.plan import USABLE, Plan, make_plan, memory_of
from polygpt.planning.request import LARGEST_MESH, batch_devices
from polygpt.sharding import MeshConfig
from polygpt.training import RunConfig

# What is left of a step's temporaries with each kind of rematerialisation, roughly; compiling tells exactly.
_REMAT = {"none": 1.0, "dots": 0.7, "block": 0.4, "full": 0.3}
_MOST_PARTS, _MOST_TENSOR, _TRIES = 64, 8, 4


def find_fitting(plan: Plan, progress: Callable[[str], None] = lambda layout: None) -> Plan | None:
    """A plan that fits, for as many devices as `plan` or, if none does, for more; None if none is found.

    Layouts that need less by a rough count are compiled one after the other, at most four, those first that slow
    training down least.

    Args:
        plan: one that does not fit.
        progress: progress callback, called with the layout that is compiled next.
    """
    limit, nearest, tries = USABLE * memory_of(plan.accelerator), plan, 0
    for config in _candidates(plan.config):
        if _expected(config, nearest) > limit:
            continue
        progress(layout_settings(config, plan.config))
        found = make_plan(config, plan.accelerator)
        if found.fits:
            return found
        nearest, tries = found, tries + 1
        if tries == _TRIES:
            break
    return None


def layout_settings(config: RunConfig, other: RunConfig) -> str:
    """The settings of `config`'s layout as typed, without those that `other` has as well (the mesh is always named)."""
    mesh = config.mesh or MeshConfig()
    words = [f"mesh.{axis}={getattr(mesh, axis)}" for axis in ("data", "fsdp", "tensor", "expert")]
    named = [word for word in words if not word.endswith("=1")] or words[:1]
    for key in ("batch_size", "accumulation_steps", "remat"):
        value = getattr(config.training, key)
        if value != getattr(other.training, key):
            named.append(f"training.{key}={value}")
    return " ".join(named)


def _candidates(config: RunConfig) -> Iterator[RunConfig]:
    """Layouts from the mildest change to the strongest: more devices only where nothing else is left."""
    mesh = config.mesh or MeshConfig()
    devices = mesh.devices
    while devices <= LARGEST_MESH:
        for tensor, remat, parts in itertools.product(_tensors(config), _remats(config), _parts(config)):
            per_layer = devices // mesh.expert
            if per_layer % tensor:
                continue
            shared = per_layer // tensor
            # Weights split as far as need be: replicas (data) save gathers.
            for data in sorted((n for n in range(1, shared + 1) if shared % n == 0 and n <= mesh.data), reverse=True):
                axes = {"data": data, "fsdp": shared // data, "tensor": tensor, "expert": mesh.expert}
                new = MeshConfig(**axes, rules=mesh.rules, activation_rules=mesh.activation_rules)
                rows = batch_devices(new) * parts
                size = config.training.batch_size
                if devices > mesh.devices:  # more devices see more rows
                    size = -(-size // rows) * rows
                if size % rows == 0:
                    training = config.training.replace(accumulation_steps=parts, remat=remat, batch_size=size)
                    yield config.model_copy(update={"mesh": new, "training": training})
        devices *= 2


def _tensors(config: RunConfig) -> list[int]:
    heads = {getattr(layer.attention, "num_heads", 1) for layer in config.model.layers}
    first = 1 if config.mesh is None else config.mesh.tensor
    return [first, *(n for n in (2, 4, _MOST_TENSOR) if n > first and not any(count % n for count in heads))]


def _remats(config: RunConfig) -> list[str]:
    kinds = list(_REMAT)
    return [kind for kind in kinds[kinds.index(config.training.remat) :] if kind in (config.training.remat, *kinds[2:])]


def _parts(config: RunConfig) -> list[int]:
    first = config.training.accumulation_steps
    return [n for n in (first * 2**i for i in range(7)) if n <= max(first, _MOST_PARTS)]


def _expected(config: RunConfig, plan: Plan) -> float:
    """Bytes at the peak, roughly: the state by how it is split, temporaries by the tokens that are computed at once."""
    state = plan.program.parameter_bytes + plan.program.optimizer_bytes
    share = _split(plan.config) / _split(config)
    tokens = _tokens(config) / _tokens(plan.config)
    remat = _REMAT[config.training.remat] / _REMAT[plan.config.training.remat]
    # Gradients and the updated state, which is held beside the old one, are temporaries of the state's size.
    updating = min(plan.program.temporary_bytes, 1.33 * state)
    return (state + updating) * share + (plan.program.temporary_bytes - updating) * tokens * remat


def _split(config: RunConfig) -> int:
    return 1 if config.mesh is None else config.mesh.fsdp * config.mesh.tensor


def _tokens(config: RunConfig) -> float:
    """Rows that a device computes at once; those of a tensor axis share them."""
    tensor = 1 if config.mesh is None else config.mesh.tensor
    return config.training.batch_size / (
        batch_devices(config.mesh or MeshConfig()) * config.training.accumulation_steps * tensor
    )
