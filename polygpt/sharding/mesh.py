"""Which devices a configuration asks for, and the JAX mesh of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from polygpt.errors import RequestError
from polygpt.sharding.config import MESH_AXES, MeshConfig, MeshSetting


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (by default all, of every process); without a mesh, the first local device.

    Raises:
        RequestError: the mesh has another number of devices.
    """
    if config is None:
        config, devices = MeshConfig(), jax.local_devices()[:1] if devices is None else devices
    devices = jax.devices() if devices is None else devices
    if config.devices != len(devices):
        raise RequestError(_wrong_count(config, len(devices)))
    return jax.make_mesh(config.shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def choose_mesh(
    asked: MeshSetting, batch_size: int, devices: int, layout: MeshConfig | None = None
) -> tuple[MeshConfig | None, str | None]:
    """The mesh of a configuration, and a note if it is not the one that was asked for; None for one device.

    Args:
        asked: the configuration's `mesh`.
        batch_size: rows in a batch (those of one part of it, if a batch is accumulated).
        devices: how many devices there are.
        layout: the model's own default, which `auto`, or no setting, takes where there are as many devices.
    """
    if asked is None or asked == "auto":
        if layout is not None and layout.devices == devices > 1:
            return layout, f"mesh: {describe_mesh(layout.shape)}, the default layout of this model on {devices} devices"
        if asked is None or devices == 1:
            return None, None
        used = next(count for count in range(devices, 0, -1) if batch_size % count == 0)
        fewer = f" of {devices} devices, since they divide the {batch_size} rows of a batch" if used < devices else ""
        return MeshConfig(data=used) if used > 1 else None, f"mesh: data {used}{fewer}"
    if layout is not None and asked.shape == layout.shape and not (asked.rules or asked.activation_rules):
        return layout, None
    return asked, None


def describe_mesh(shape: Sequence[int] | Mapping[str, int]) -> str:
    """The axes that have more than one device: `data 2 × tensor 4`."""
    sizes = dict(shape) if isinstance(shape, Mapping) else dict(zip(MESH_AXES, shape, strict=True))
    named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return " × ".join(named) or "one device"


def _wrong_count(config: MeshConfig, devices: int) -> str:
    asked = {name: size for name, size in zip(MESH_AXES, config.shape, strict=True) if size > 1} or {"data": 1}
    product = " × ".join(f"{name} {size}" for name, size in asked.items())
    if devices == 1:
        simulated = (
            f"XLA_FLAGS=--xla_force_host_platform_device_count={config.devices} simulates {config.devices} on a CPU"
        )
        return f"mesh: {product} is a mesh of {config.devices} devices, but there is 1; leave it out ({simulated})"
    written = [
        " ".join(f"mesh.{name}={count}" for name, count in zip(asked, sizes, strict=True))
        for sizes in _nearest(tuple(asked.values()), devices)
    ]
    return (
        f"mesh: {product} is a mesh of {config.devices} device{'s' * (config.devices > 1)}, but there are {devices}; "
        f"{devices} would be {' or '.join(written)} "
        "(mesh=auto chooses by itself)"
    )


def _nearest(sizes: tuple[int, ...], devices: int) -> list[tuple[int, ...]]:
    """Up to two ways to give as many axes `devices` devices, those that change the fewest axes first."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    found = [new for new in itertools.product(divisors, repeat=len(sizes)) if math.prod(new) == devices]
    changed = [(sum(a != b for a, b in zip(new, sizes, strict=True)), [-n for n in new], new) for new in found]
    return [new for _, _, new in sorted(changed)[:2]]
