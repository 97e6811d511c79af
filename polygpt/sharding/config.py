"""The part `mesh` of a configuration: how many devices each axis of the mesh has, and changes to the rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt, Tag, model_validator

from polygpt.config import Config, as_yaml

MESH_AXES = ("data", "fsdp", "tensor", "expert")
MeshAxis = Literal["data", "fsdp", "tensor", "expert"]


def _axes(table: Any) -> Any:
    """A table of rules as typed or read from YAML, each entry a list of mesh axes."""
    table = as_yaml(table)
    if not isinstance(table, Mapping):
        return table
    return {name: _entry(name, axes) for name, axes in table.items()}


def _entry(name: str, axes: Any) -> tuple[str, ...]:
    found = () if axes is None else (axes,) if isinstance(axes, str) else axes
    if not isinstance(found, list | tuple) or any(found.count(axis) > 1 or axis not in MESH_AXES for axis in found):
        named = f"{', '.join(map(repr, MESH_AXES[:-1]))} or {MESH_AXES[-1]!r}"
        raise ValueError(f"{name} can be split over {named}, each named once, or nothing; not over {axes!r}")
    return tuple(found)


RuleChanges = Annotated[
    dict[str, Annotated[tuple[MeshAxis, ...], Field(strict=False)]], Field(strict=False), BeforeValidator(_axes)
]


class MeshConfig(Config):
    """The devices that a model is spread over, as a grid with four axes.

    The product of the four must be the number of devices. An axis of an array that cannot be split evenly is
    replicated.

    Attributes:
        data: the batch is split over these devices, and each holds all weights.
        fsdp: the batch is split over these devices, and so are weights, gradients and the optimizer's state; weights
            are gathered layer by layer where they are used.
        tensor: heads, hidden units and the vocabulary are split over these devices, which compute every product
            together.
        expert: the batch is split over these devices, and each holds some of the experts.
        rules: changes to the table for parameters: which mesh axes a logical axis is split over, such as
            `{heads: null, embed: [fsdp, data]}`. The logical axes are `embed`, `vocab`, `heads`, `kv_heads`, `mlp`,
            `expert`, and those that a part of your own names.
        activation_rules: changes to the table for activations; beside those above there is `batch`.
    """

    data: PositiveInt = 1
    fsdp: PositiveInt = 1
    tensor: PositiveInt = 1
    expert: PositiveInt = 1
    rules: RuleChanges = {}
    activation_rules: RuleChanges = {}

    def __hash__(self) -> int:
        return hash(self.shape)

    @model_validator(mode="before")
    @classmethod
    def _axes_over_auto(cls, data: Any) -> Any:
        # `mesh.fsdp=8` over a recipe's `mesh: auto`.
        if isinstance(data, Mapping) and data.get("kind") == "auto":
            return {name: value for name, value in data.items() if name != "kind"}
        if not isinstance(data, Mapping | MeshConfig):
            raise ValueError(f"a mapping is needed, not {data!r}: mesh.data=8, say; or mesh=auto")
        return data

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The number of devices of each axis, in the order of `MESH_AXES`."""
        return self.data, self.fsdp, self.tensor, self.expert

    @property
    def devices(self) -> int:
        """The number of devices of the whole mesh."""
        return math.prod(self.shape)


# What a configuration may say: a mesh, `auto`, or nothing (one device).
MeshSetting = (
    Annotated[
        Annotated[MeshConfig, Tag("MeshConfig")] | Annotated[Literal["auto"], Tag("auto")],
        Discriminator(lambda value: "auto" if value == "auto" else "MeshConfig"),
    ]
    | None
)


class MeshOnly(Config):
    """A mesh by itself, for commands that take no other settings."""

    mesh: MeshSetting = None
