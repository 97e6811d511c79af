"""How a checkpoint of other people's lays out our parameters: the tables of names, turned into tensors.

A table maps each foreign tensor's name to the parameter it holds, or to several that lie one after another in it.
`{layer}` and `{expert}` in a name are counted through. The same list of tensors serves reading and writing, so what one
does the other undoes. Knows names and shapes; no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from polygpt.model import Model, ParameterInfo

# Foreign name -> our parameters in the order in which their outputs lie in it. A parameter of a layer is written
# `blocks.attention.query`; the entry of the pattern and the place in its stack follow from {layer}.
NameTable = Mapping[str, str | tuple[str, ...]]
Path = tuple[str | int, ...]


def affine(name: str, weight: str | tuple[str, ...], bias: str | None = None) -> dict[str, str | tuple[str, ...]]:
    """Two rows of a table: a weight and its bias, ours called as the weight with `_bias` after it."""
    biases = f"{weight}_bias" if isinstance(weight, str) else tuple(f"{part}_bias" for part in weight)
    return {f"{name}.weight": weight, f"{name}.bias": bias or biases}


@dataclass(frozen=True)
class Layout:
    """How a format stores what a table names.

    Attributes:
        inputs_first: a pattern of foreign names whose matrices are [in, out]; others are [out, in] (torch's Linear).
        interleaved: parameters in whose heads rotary pairs are neighbours (2i, 2i+1); ours are (i, i + H/2).
    """

    inputs_first: str = r"(?!)"
    interleaved: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Piece:
    """One matrix or vector of ours, as a part of a foreign tensor.

    Attributes:
        path: our parameter.
        index: which of its stack: the place among the layers of its pattern entry, the expert.
        shape: of the matrix as we hold it, padding of the vocabulary left out.
        inputs: its contracted axes; 0 for a table, None for a vector.
        interleaved: see `Layout`.
    """

    path: Path
    index: tuple[int, ...]
    shape: tuple[int, ...]
    inputs: int | None
    interleaved: bool

    def flat(self) -> tuple[int, ...]:
        """Its shape with inputs and outputs in one axis each: (in, out), or (size,) for a vector."""
        if self.inputs is None:
            return (math.prod(self.shape),)
        if self.inputs == 0:
            return self.shape
        return math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :])

    def within(self, array: np.ndarray) -> np.ndarray:
        """The place of this piece in the whole parameter."""
        return array[self.index][tuple(slice(size) for size in self.shape)]


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of a foreign checkpoint, and which of our parameters make it up.

    Attributes:
        name: its name there.
        pieces: ours, in the order in which their outputs lie in it.
        outputs_first: its matrices are [out, in].
    """

    name: str
    pieces: tuple[Piece, ...]
    outputs_first: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape there."""
        flats = [self._theirs(piece) for piece in self.pieces]
        return tuple(sum(f[self._axis] for f in flats) if i == self._axis else n for i, n in enumerate(flats[0]))

    @property
    def _axis(self) -> int:
        """The axis along which pieces lie one after another: their outputs."""
        return 0 if self.outputs_first or self.pieces[0].inputs is None else 1

    def _turned(self, piece: Piece) -> bool:
        return self.outputs_first and bool(piece.inputs)

    def _theirs(self, piece: Piece) -> tuple[int, ...]:
        flat = piece.flat()
        return flat[::-1] if self._turned(piece) else flat

    def split(self, array: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
        """Each piece with its values as we hold them (a view where that is possible)."""
        start = 0
        for piece in self.pieces:
            width = self._theirs(piece)[self._axis]
            own = array[start : start + width] if self._axis == 0 else array[:, start : start + width]
            start += width
            own = (own.T if self._turned(piece) else own).reshape(piece.shape)
            if piece.interleaved:
                own = np.concatenate([own[..., 0::2], own[..., 1::2]], axis=-1)
            yield piece, own

    def join(self, values: Callable[[Path], np.ndarray]) -> np.ndarray:
        """The tensor as it is there; `values` gives a whole parameter of ours."""
        parts = []
        for piece in self.pieces:
            own = piece.within(values(piece.path))
            if piece.interleaved:
                half = piece.shape[-1] // 2
                own = np.stack([own[..., :half], own[..., half:]], axis=-1).reshape(piece.shape)
            own = own.reshape(piece.flat())
            parts.append(own.T if self._turned(piece) else own)
        return np.ascontiguousarray(np.concatenate(parts, axis=self._axis) if len(parts) > 1 else parts[0])


def foreign_tensors(model: Model, table: NameTable, layout: Layout) -> list[ForeignTensor]:
    """The tensors in which a foreign checkpoint holds `model`: those of the table whose parameters the model has.

    Raises:
        KeyError: the model has a parameter that the table does not name.
    """
    parameters = flatten_dict(model.parameters)
    unnamed = set(parameters)
    tensors = []
    for name, ours in table.items():
        for layer in range(model.config.num_layers) if "{layer}" in name else (None,):
            paths = [_path(path, layer, model) for path in ((ours,) if isinstance(ours, str) else ours)]
            # Of a layer with one feed-forward the rows of experts are left out, and the other way round.
            if not all(path in parameters and _is_row_of(name, parameters[path]) for path in paths):
                continue
            unnamed -= set(paths)
            for expert in range(_experts(parameters[paths[0]])) if "{expert}" in name else (None,):
                pieces = tuple(_piece(model, path, parameters[path], layer, expert, layout) for path in paths)
                outputs_first = re.fullmatch(layout.inputs_first, name) is None
                tensors.append(ForeignTensor(name.format(layer=layer, expert=expert), pieces, outputs_first))
    if unnamed:
        raise KeyError(".".join(map(str, min(unnamed, key=str))))
    return tensors


def _path(path: str, layer: int | None, model: Model) -> Path:
    words: Sequence[Any] = path.split(".")
    return tuple(words) if layer is None else ("blocks", layer % len(model.config.pattern), *words[1:])


def _is_row_of(name: str, info: ParameterInfo) -> bool:
    return ("{expert}" in name) == (info.stack > 1)


def _experts(info: ParameterInfo) -> int:
    return info.shape[info.axes.index("expert")]


def _piece(
    model: Model, path: Path, info: ParameterInfo, layer: int | None, expert: int | None, layout: Layout
) -> Piece:
    index = () if layer is None else (layer // len(model.config.pattern),)
    index += () if expert is None else (expert,)
    stacked = len(index)
    padding = model.config.vocab_padding
    shape = [n - padding * (axis == "vocab") for n, axis in zip(info.shape, info.axes, strict=True)]
    name = ".".join(str(word) for word in path if not isinstance(word, int))
    return Piece(path, index, tuple(shape[stacked:]), info.inputs, name in layout.interleaved)
