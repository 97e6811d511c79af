"""Converts between a layer's experts stacked in one tensor (newer files) and one tensor per expert (older files)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from polygpt.interop.gguf.container import GGUFFile
from polygpt.interop.weights import TensorInfo

_STACKED = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight")
_SINGLE = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight")
_LIMIT = 4096  # experts per layer


class Unstacked:
    """A `TensorSource` over a file that presents stacked experts as separate tensors."""

    def __init__(self, file: GGUFFile):
        self.where, self._file = file.where, file
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[str, int]] = {}
        for name, info in file.tensors.items():
            match = _STACKED.fullmatch(name)
            if match is None or len(info.shape) != 3 or info.shape[0] > _LIMIT:
                self.tensors[name] = info
                continue
            for expert in range(info.shape[0]):
                own = f"{match[1]}.{expert}.weight"
                self.tensors[own] = TensorInfo(info.shape[1:], info.dtype)
                self._places[own] = name, expert

    def read(self, name: str) -> np.ndarray:
        return self._file.read(*self._places.get(name, (name,)))


def stacked_name(name: str) -> str:
    """The name of the tensor in which `name` is stacked; `name` itself if it is not an expert's."""
    match = _SINGLE.fullmatch(name)
    return name if match is None else f"{match[1]}_exps.weight"


def stack(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """`tensors` with the experts of each layer, which are consecutive, stacked; at most one stack is in memory."""
    name, held = "", []
    for single, values in tensors:
        stacked = stacked_name(single)
        if held and stacked != name:
            yield name, np.stack(held)
            held = []
        if stacked == single:
            yield single, values
        else:
            name = stacked
            held.append(values)
    if held:
        yield name, np.stack(held)
