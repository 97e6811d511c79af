"""The text of an XLA program (HLO): its computations, how often each runs, the sizes of arrays, its products."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) (?:\(.*\) -> .*)?\{$")
_CALLEES = re.compile(r"\b(?:body|to_apply|calls|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_LIMIT = re.compile(r" = s32\[\] constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_NAMED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\S+?)(?:\{\S*)? ")
_DOT = re.compile(
    r" = (?P<shape>\S+?)(?:\{\S*)? dot\(%?(?P<lhs>[\w.\-]+), .*\blhs_contracting_dims=\{(?P<dims>[\d,]*)\}"
)

# The names of types as JAX writes them.
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "s8": "int8"}


class Product(NamedTuple):
    """Matrix products of one type.

    Attributes:
        dtype: of the operands.
        flops: in all executions, 2 for each multiplication.
    """

    dtype: str
    flops: int


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; the entry computation has the name ''."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found["" if match["entry"] else match["name"]] = []
        else:
            lines.append(line)
    return found


def executions(bodies: Mapping[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one run of the program.

    A branch of a conditional counts as taken; a loop whose number of iterations is unknown counts once.
    """
    calls = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    counts = dict.fromkeys(bodies, 0)

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for callee, trips in calls[name]:
            visit(callee, times * trips)

    visit("", 1)
    return counts


def _calls(lines: Iterable[str], bodies: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
    for line in lines:
        trips = _trips(line, bodies) if " while(" in line else 1
        names = _CALLEES.findall(line)
        for listed in _BRANCHES.findall(line):
            names += [name.strip(" %") for name in listed.split(",")]
        yield from ((name, trips) for name in names if name in bodies)


def _trips(line: str, bodies: Mapping[str, list[str]]) -> int:
    """Iterations of a loop: as XLA found them or, before it looked, the one limit in the condition of a scan."""
    if match := _TRIPS.search(line):
        return int(match[1])
    condition = _CONDITION.search(line)
    limits = _LIMIT.findall("\n".join(bodies.get(condition[1], ()))) if condition else []
    return int(limits[0]) if len(limits) == 1 else 1


def array_bytes(shape: str) -> list[int]:
    """The bytes of each array in a shape, a tuple's included: `(f32[8,4], bf16[2])`."""
    return [_bytes(*array) for array in _ARRAY.findall(shape)]


def _bytes(dtype: str, bits: str, dims: str) -> int:
    count = math.prod(_dims(dims))
    return count if dtype == "pred" else -(-count * int(bits) // 8)


def _dims(text: str) -> list[int]:
    return [int(dim) for dim in text.split(",") if dim]


def products(text: str) -> list[Product]:
    """The matrix products of a program in which `dot` has not been replaced by calls of libraries."""
    bodies = computations(text)
    found = []
    for name, times in executions(bodies).items():
        shapes: dict[str, str] = {}
        for line in bodies[name] if times else ():
            if match := _NAMED.match(line):
                shapes[match[1]] = match[2]
            if match := _DOT.search(line):
                (dtype, _, lhs), (_, _, out) = (
                    _ARRAY.match(shape).groups() for shape in (shapes[match["lhs"]], match["shape"])
                )
                contracted = math.prod(_dims(lhs)[dim] for dim in _dims(match["dims"]))
                found.append(Product(_DTYPES.get(dtype, dtype), 2 * math.prod(_dims(out)) * contracted * times))
    return found
