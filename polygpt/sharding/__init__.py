"""The device mesh, and the rules by which arrays are split over it.

Parameters and activations name their axes logically (`embed`, `heads`, `batch`). Two tables say which axes of the mesh
each of them is split over; nothing outside this package knows.
"""

from polygpt.sharding.communication import Collective, bytes_by_axes, collectives
from polygpt.sharding.config import MESH_AXES, MeshConfig, MeshOnly, MeshSetting
from polygpt.sharding.fit import bytes_per_device, check_fit, check_rows, replication
from polygpt.sharding.hlo import products
from polygpt.sharding.mesh import choose_mesh, describe_mesh, make_mesh
from polygpt.sharding.rules import (
    ACTIVATION_RULES,
    DEFAULT_RULES,
    PARAMETER_RULES,
    Replicated,
    Rules,
    batch_sharding,
    placement,
    replicated_axes,
    sharding_of,
)
from polygpt.sharding.scope import (
    Scope,
    Splits,
    axes_of,
    constrain,
    current_mesh,
    device_index,
    gathered,
    keeps_gathered,
    own_splits,
    sharded,
    use_mesh,
    whole_rows,
)

__all__ = [
    "ACTIVATION_RULES",
    "DEFAULT_RULES",
    "MESH_AXES",
    "PARAMETER_RULES",
    "Collective",
    "MeshConfig",
    "MeshOnly",
    "MeshSetting",
    "Replicated",
    "Rules",
    "Scope",
    "Splits",
    "axes_of",
    "batch_sharding",
    "bytes_by_axes",
    "bytes_per_device",
    "check_fit",
    "check_rows",
    "choose_mesh",
    "collectives",
    "constrain",
    "current_mesh",
    "describe_mesh",
    "device_index",
    "gathered",
    "keeps_gathered",
    "make_mesh",
    "own_splits",
    "placement",
    "products",
    "replicated_axes",
    "replication",
    "sharded",
    "sharding_of",
    "use_mesh",
    "whole_rows",
]
