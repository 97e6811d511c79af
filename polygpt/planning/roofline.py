"""How long a step would take on an accelerator, by a roofline: what the slowest of its resources needs.

products     FLOPs at the peak of their type
memory       the state read and written once, temporaries written and read once, at the bandwidth of the memory
collectives  what ring algorithms send, at the bandwidth of the axes' links

Gathers of weights and reductions of gradients (axes `data` and `fsdp`) overlap with products, as XLA schedules them on
GPUs and TPUs. Products wait for what is sent along `tensor` and `expert`. So a step takes

    max(products, memory, collectives of data and fsdp) + collectives of the other axes

which real steps do not reach: 40 to 60 % of the peak is usual for large matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from polygpt.planning.program import Program
from polygpt.sharding import MESH_AXES
from polygpt.training import ACCELERATORS, Peak, listed, listed_peak

OVERLAPPING = {"data", "fsdp"}


class Estimate(NamedTuple):
    """Seconds of a step, in all and by resource."""

    step_seconds: float
    product_seconds: float
    memory_seconds: float
    collective_seconds: dict[str, float]


def estimate(program: Program, mesh: Mapping[str, int], accelerator: str, precision: str | None = None) -> Estimate:
    """The roofline of `program` on a mesh of `accelerator`s."""
    kind = ACCELERATORS[accelerator]
    row = listed(kind)
    products = sum(flops / listed_peak(kind, dtype, precision) for dtype, flops in program.flops.items())
    state = program.parameter_bytes + program.optimizer_bytes
    memory = 2 * (state + program.temporary_bytes) / (row.bandwidth * 1e12)
    sending = {axes: sent / axes_bandwidth(axes.split("+"), mesh, row) for axes, sent in program.sent_bytes.items()}
    beside = sum(seconds for axes, seconds in sending.items() if set(axes.split("+")) <= OVERLAPPING)
    waiting = sum(sending.values()) - beside
    return Estimate(max(products, memory, beside) + waiting, products, memory, sending)


def axes_bandwidth(axes: list[str], mesh: Mapping[str, int], row: Peak) -> float:
    """Bytes a second that each device sends in a collective along `axes`.

    Devices are numbered with the last axis of the mesh running fastest, and every `island` of them are joined by links.
    A collective that leaves the island goes through the network: all members of a group in one island send at the same
    time, each by its own adapter, but never faster than the links.
    """
    inner, members = 1, 1
    for axis in reversed(MESH_AXES):
        size = mesh.get(axis, 1)
        if axis in axes:
            members *= min(size, max(row.island // inner, 1))
        inner *= size
    whole = math.prod(mesh.get(axis, 1) for axis in axes)
    return 1e9 * (row.link if members >= whole else min(row.link, row.network * members))
