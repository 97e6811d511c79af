"""The mesh that a run trains on, chosen from its configuration and the devices that there are."""

from __future__ import annotations

import jax

from polygpt.distributed import process_count
from polygpt.model import Model
from polygpt.sharding import MeshConfig, Scope, check_fit, check_rows, choose_mesh
from polygpt.training.config import RunConfig
from polygpt.training.events import Listener, Note


def mesh_of(config: RunConfig, model: Model, emit: Listener = lambda note: None) -> Scope | None:
    """The mesh of a run; None for one device. Several processes always share one mesh of all their devices.

    Raises:
        RequestError: as `check_devices`, or the model does not fit the mesh.
    """
    scope, note = _chosen(config)
    if note is not None:
        emit(Note(note))
    if scope is not None:
        for note in check_fit(model.parameters, scope):
            emit(Note(f"mesh: {note}", warning=True))
    return scope


def check_devices(config: RunConfig) -> None:
    """Checks what can be checked of the mesh before there is a model.

    Raises:
        RequestError: the mesh does not fit the devices, or the batch does not fit the mesh.
    """
    _chosen(config)


def _chosen(config: RunConfig) -> tuple[Scope | None, str | None]:
    """The mesh of a run, and a note if it is not the one that was asked for."""
    training, devices = config.training, jax.device_count()
    rows, setting = training.batch_size, "training.batch_size"
    if training.accumulation_steps > 1:
        rows, setting = rows // training.accumulation_steps, f"{setting} / training.accumulation_steps"
    mesh, note = choose_mesh(config.mesh, rows, devices, config.model.layout)
    if process_count() > 1 and (mesh is None or (config.mesh == "auto" and mesh.devices < devices)):
        mesh = MeshConfig(data=devices)
        note = f"mesh: data {devices}, the devices of {process_count()} processes"
    # `auto` may have chosen fewer than there are.
    scope = None if mesh is None else Scope.of(mesh, jax.devices()[: mesh.devices] if config.mesh == "auto" else None)
    if scope is not None:
        check_rows(rows, scope, setting)
    return scope, note
