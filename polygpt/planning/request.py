"""From a name and settings to the run that is planned; a layout that cannot be is refused before compiling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh

from polygpt.config import as_yaml, dotted_to_nested, merge, validate
from polygpt.errors import RequestError
from polygpt.model import model_of
from polygpt.recipes import named_fields
from polygpt.sharding import MESH_AXES, MeshConfig, Rules, Scope, check_fit, check_rows, choose_mesh, describe_mesh
from polygpt.summary import resolve_model
from polygpt.training import RunConfig

LARGEST_MESH = 512


def planned_run(name: str, overrides: Mapping[str, Any]) -> RunConfig:
    """The run that `name` (a recipe, a run's file or folder; a preset or any other model) and the settings describe.

    A name that a recipe and a preset share is the recipe. A model alone is trained by AdamW, and unless
    `training.batch_size` says otherwise with a row for each device that the batch is split over.

    Raises:
        RequestError: there is nothing by that name, a setting is wrong, or the mesh fits neither model nor batch.
    """
    found = named_fields(name, recipe_first=True)
    if found is not None and found[1]:
        resolved = resolve_model(name, overrides, recipe_first=True)
        config = resolved.run.model_copy(update={"model": resolved.model})
    else:
        config = _run_of_model(name, overrides)
    if config.mesh == "auto":
        raise RequestError("mesh=auto is for the devices of this machine; name those to plan for, as in mesh.fsdp=8")
    count = 1 if config.mesh is None else config.mesh.devices
    mesh, _ = choose_mesh(config.mesh, config.training.batch_size, count, config.model.layout)
    config = config.model_copy(update={"mesh": mesh})
    check_layout(config)
    return config


def _run_of_model(name: str, overrides: Mapping[str, Any]) -> RunConfig:
    of_model = {key: value for key, value in overrides.items() if key.partition(".")[0] == "model"}
    others = {key: value for key, value in overrides.items() if key not in of_model}
    for key in others:
        if key.partition(".")[0] not in ("training", "mesh"):
            raise RequestError(f"{key}: {name} is a model without a run; write model., training. or mesh. settings")
    model = resolve_model(name, of_model).model
    parts = as_yaml(others.get("training.accumulation_steps", 1))
    fields = {"model": model.to_dict(), "training": {"steps": 1000, "batch_size": parts}}
    config = validate(RunConfig, merge(fields, dotted_to_nested(others)))
    if "training.batch_size" in others or not isinstance(config.mesh, MeshConfig):
        return config
    rows = batch_devices(config.mesh) * config.training.accumulation_steps
    return config.model_copy(update={"training": config.training.replace(batch_size=rows)})


def abstract_scope(mesh: MeshConfig) -> Scope:
    """The mesh without devices."""
    return Scope(AbstractMesh(mesh.shape, MESH_AXES), Rules.of(mesh))


def batch_devices(mesh: MeshConfig) -> int:
    """How many parts the rows of a batch are split into."""
    return abstract_scope(mesh).batch_devices


def check_layout(config: RunConfig) -> list[str]:
    """What every device holds whole since it cannot be split evenly.

    Raises:
        RequestError: the mesh is too large, or the batch, heads or experts cannot be split evenly.
    """
    mesh, training = config.mesh or MeshConfig(), config.training
    if mesh.devices > LARGEST_MESH:
        raise RequestError(
            f"mesh: {describe_mesh(mesh.shape)} has {mesh.devices:,} devices; at most {LARGEST_MESH} are planned for"
        )
    rows, parts = training.batch_size, training.accumulation_steps
    of_parts = f" in {parts} parts (training.accumulation_steps)" if parts > 1 else ""
    scope = abstract_scope(mesh)
    check_rows(rows // parts, scope, f"training.batch_size={rows}{of_parts}")
    return check_fit(model_of(config.model).parameters, scope)


def portable(config: RunConfig) -> dict[str, Any]:
    """The plain configuration for the process that compiles: kernels that only an accelerator has are left out."""
    fields = config.to_dict()
    return {
        "model": _with_any_kernel(fields["model"]),
        "training": {**fields["training"], "initial": None},
        "mesh": fields["mesh"],
    }


def _with_any_kernel(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: "auto" if key == "implementation" else _with_any_kernel(inner) for key, inner in value.items()}
    return [_with_any_kernel(inner) for inner in value] if isinstance(value, list) else value
