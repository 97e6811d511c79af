"""The collectives of a compiled program: what is sent between devices, over which axes of the mesh, and how much.

Read from the optimized HLO that `compiled.as_text()` gives. There, replica ids are positions in `mesh.devices.flat`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from polygpt.sharding.hlo import array_bytes, computations, executions

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<kind>" + "|".join(KINDS) + r"|ragged-all-to-all)"
    r"(?P<start>-start)?\("
)
_USES = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:, |$)")
_OPERAND = re.compile(r"%?([\w.\-]+)(?:, |$)")
_MOVES = {"convert", "copy", "reshape", "transpose", "bitcast"}  # what may come before the slice
_OP_NAME = re.compile(r'op_name="([^"]*)"')

# The four ways of writing groups: {{0,1},{2,3}}; [groups,size]<=[dims]T(order); pairs; a mesh of XLA's own.
_LISTED = re.compile(r"\b(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>.*?)\))? ?\{(?P<over>[^}]*)\}")
_PERMUTED = re.compile(r"\[([\d,]+)\]T\(([\d,]+)\)")
_SUB_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")


class MeshShape(Protocol):
    """What is needed of a mesh: `jax.sharding.Mesh` and `AbstractMesh` have it."""

    shape: Mapping[str, int]


class Collective(NamedTuple):
    """One collective of a program, as every device runs it.

    Attributes:
        kind: one of `KINDS`.
        axes: the mesh axes along which data moves, in the mesh's order; none if it moves nowhere.
        bytes: of the whole array on one device, in all executions: what is gathered, reduced, or before scattering.
        times: executions in one run of the program; loops whose number of iterations is unknown count once.
        group: how many devices take part together.
        shape: the result on one device, as HLO writes it: `bf16[8,128]`.
        op_name: what the instruction was traced from.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int
    group: int
    shape: str
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all executions, by the ring algorithms."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (self.group - 1) / self.group


def collectives(compiled_text: str, mesh: MeshShape, scatters: bool = False) -> list[Collective]:
    """Every collective of a program in the order of its text, without those among groups of one device.

    Args:
        compiled_text: the optimized HLO (`compiled.as_text()`), or that after partitioning.
        mesh: the mesh that it was partitioned for.
        scatters: an all-reduce of which each device uses only a slice is a reduce-scatter; that is how GPUs and TPUs
            run it, while the compiler for CPUs leaves it as it is.
    """
    bodies = computations(compiled_text)
    found = []
    for name, times in executions(bodies).items():
        sliced = _sliced(bodies[name]) if scatters and times else set()
        for line in bodies[name] if times else ():
            if match := _INSTRUCTION.match(line):
                collective = _collective(line, match, times, mesh)
                if match["name"] in sliced:
                    collective = collective._replace(kind="reduce-scatter")
                if collective.axes:
                    found.append(collective)
    return found


def _sliced(lines: list[str]) -> set[str]:
    """All-reduces of which nothing but a slice is used, perhaps after their type or layout has changed."""
    users: dict[str, list[tuple[str, str]]] = {}
    reduced = []
    for line in lines:
        if match := _USES.match(line):
            name, operation, operands = match.groups()
            reduced += [name] if operation == "all-reduce" else []
            for operand in _OPERAND.findall(operands):
                users.setdefault(operand, []).append((name, operation))

    def is_sliced(name: str) -> bool:
        used = users.get(name, [])
        return bool(used) and all(op == "dynamic-slice" or (op in _MOVES and is_sliced(user)) for user, op in used)

    return {name for name in reduced if is_sliced(name)}


def bytes_by_axes(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Bytes by kind for each set of axes (`data`, `data+fsdp`)."""
    totals: dict[str, dict[str, int]] = {}
    for each in found:
        kinds = totals.setdefault("+".join(each.axes), {})
        kinds[each.kind] = kinds.get(each.kind, 0) + each.bytes
    return totals


def _collective(line: str, match: re.Match, times: int, mesh: MeshShape) -> Collective:
    kind = match["kind"].removeprefix("ragged-")
    groups = _groups(line, math.prod(mesh.shape.values()))
    group = 2 if "source_target_pairs" in line else groups.shape[1]
    sizes = array_bytes(match["shape"])
    size = sum(sizes)
    if match["start"] and kind == "all-gather":  # inputs and outputs
        size = size * group // (group + 1)
    elif match["start"] and kind == "collective-permute":  # input, output, and two counters
        size = sizes[1]
    if kind == "reduce-scatter":
        size *= group
    op_name = _OP_NAME.search(line)
    return Collective(
        kind,
        _axes(groups, mesh),
        size * times,
        times,
        group,
        re.sub(r"\{[^}]*\}|/\*.*?\*/", "", match["shape"]),
        op_name[1] if op_name else "",
    )


def _axes(groups: np.ndarray, mesh: MeshShape) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())), -1)
    differ = (places != places[:, :1]).any((0, 1))
    return tuple(axis for axis, moves in zip(mesh.shape, differ, strict=True) if moves)


def _groups(line: str, devices: int) -> np.ndarray:
    """The groups of an instruction [groups, devices of a group]; pairs of source and target are groups of two."""
    if match := _IOTA.search(line):
        groups, size, dims, order = match.groups()
        return _iota(dims, order).reshape(int(groups), int(size))
    if match := _MESH.search(line):
        return _mesh_groups(match, devices)
    match = _LISTED.search(line)
    if match is None or match[1] is None:  # none are listed: all devices are one group
        return np.arange(devices)[None]
    return np.array([[int(id) for id in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])])


def _iota(dims: str, order: str | None) -> np.ndarray:
    dims = _numbers(dims)
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_numbers(order)) if order else ids


def _mesh_groups(match: re.Match, devices: int) -> np.ndarray:
    """Groups over some axes of a mesh that XLA names itself, whose axes need not be ours.

    `'a':(2)4` is a part of axis a: after cutting it into factors 2 · 4 · rest, the second of them.
    """
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match["axes"])}
    permuted = _PERMUTED.fullmatch(match["ids"] or "")
    if permuted:
        ids = _iota(*permuted.groups())
    else:
        ids = np.array(_numbers(match["ids"])) if match["ids"] else np.arange(devices)
    over = {}
    for name, before, size in _SUB_AXIS.findall(match["over"]):
        over.setdefault(name, []).append((int(before or 1), int(size or axes[name])))
    dims, moving = [], []
    for name, size in axes.items():
        done = 1
        for before, part in sorted(over.get(name, [])):
            dims += [before // done, part]
            moving.append(len(dims) - 1)
            done = before * part
        dims.append(size // done)
    ids = ids.reshape(dims)
    still = [axis for axis in range(len(dims)) if axis not in moving]
    return ids.transpose(still + moving).reshape(-1, math.prod(dims[axis] for axis in moving))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
