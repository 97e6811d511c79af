"""Where arrays live: the mesh, and the one table from a logical axis to a mesh axis.

Parameters and batches name their axes logically (`embed`, `heads`, `batch`); only this file knows the mesh. For now
the mesh holds one device, and the table is where more of them will be put to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from polygpt.errors import RequestError

# Logical axis -> mesh axis. An axis that is not listed is not split.
RULES: dict[str, str] = {
    "batch": "data",
    "vocab": "model",
    "mlp": "model",
    "heads": "model",
    "kv_heads": "model",
    "expert": "model",
}


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of axes (data, model) over `devices`: by default the first device of this process."""
    devices = jax.local_devices()[:1] if devices is None else devices
    return Mesh(np.asarray(devices).reshape(len(devices), 1), ("data", "model"))


def sharding_of(axes: Sequence[str], mesh: Mesh) -> NamedSharding:
    """The placement on `mesh` of an array whose axes have these logical names.

    Where two of them would be split over the same mesh axis (an expert's hidden units), the first is.
    """
    places = [RULES.get(axis) for axis in axes]
    return NamedSharding(mesh, PartitionSpec(*(None if p in places[:i] else p for i, p in enumerate(places))))


def placement(parameters: PyTree, mesh: Mesh) -> PyTree:
    """Where each parameter goes on `mesh`, for a tree of what has `shape` and `axes`.

    Raises:
        RequestError: the mesh has other axes, or a parameter cannot be split over them evenly.
    """
    if missing := set(RULES.values()) - set(mesh.axis_names):
        raise RequestError(f"the mesh has no axis {' or '.join(sorted(missing))}: it is of ('data', 'model')")

    def place(path: tuple, info: Any) -> NamedSharding:
        sharding = sharding_of(info.axes, mesh)
        try:
            sharding.shard_shape(info.shape)
        except ValueError:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise RequestError(
                f"{name} {list(info.shape)} cannot be split over the mesh {dict(mesh.shape)} evenly"
            ) from None
        return sharding

    return jax.tree.map_with_path(place, parameters)
