"""The mesh that a run trains on, chosen from its configuration and the devices that there are."""

from __future__ import annotations

import math

import jax

from polygpt.distributed import process_count
from polygpt.errors import RequestError
from polygpt.sharding import Scope, choose_mesh
from polygpt.training.config import RunConfig
from polygpt.training.events import Listener, Note


def mesh_of(config: RunConfig, emit: Listener) -> Scope | None:
    """The mesh of a run; None for one device. Several processes always share one mesh of all their devices.

    Raises:
        RequestError: the mesh does not fit the devices, or the batch does not fit the mesh.
    """
    training, devices = config.training, jax.device_count()
    rows = training.batch_size // training.accumulation_steps
    asked = "auto" if config.mesh is None and process_count() > 1 else config.mesh
    mesh, note = choose_mesh(asked, rows, devices, config.model.layout)
    if process_count() > 1 and (mesh is None or mesh.devices != devices):
        raise RequestError(_uneven(rows, devices, training.accumulation_steps))
    if note is not None:
        emit(Note(note))
    scope = Scope.of(mesh)
    if scope is not None and rows % scope.batch_devices:
        raise RequestError(_uneven(rows, scope.batch_devices, training.accumulation_steps))
    return scope


def _uneven(rows: int, devices: int, accumulation_steps: int) -> str:
    """What to say of a batch whose rows cannot be split evenly over the devices."""
    down, up = rows // devices * devices, math.ceil(rows / devices) * devices
    fitting = " or ".join(str(size * accumulation_steps) for size in dict.fromkeys((down, up)) if size)
    parts = f" in {accumulation_steps} parts" if accumulation_steps > 1 else ""
    where = f" of {process_count()} processes" if process_count() > 1 else ""
    return (
        f"training.batch_size={rows * accumulation_steps}{parts} cannot be split evenly over {devices} devices{where}; "
        f"training.batch_size={fitting} can"
    )
