"""How a foreign checkpoint stores our parameters: a table of names, expanded into a list of tensors.

A table maps the name of each foreign tensor to the parameter it holds, or to several that are concatenated in it.
`{layer}` and `{expert}` stand for every index. The same list of tensors is used to read and to write, so each direction
inverts the other. Knows names and shapes, not files.
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

# Foreign name -> our parameters, in the order in which their outputs are concatenated. A layer's parameter is written
# `blocks.attention.query`; {layer} gives the pattern entry and the index in its stack.
NameTable = Mapping[str, str | tuple[str, ...]]
Path = tuple[str | int, ...]


def affine(name: str, weight: str | tuple[str, ...], bias: str | None = None) -> dict[str, str | tuple[str, ...]]:
    """Two rows of a table: a weight and its bias, which by default is ours of the same name with `_bias` appended."""
    biases = f"{weight}_bias" if isinstance(weight, str) else tuple(f"{part}_bias" for part in weight)
    return {f"{name}.weight": weight, f"{name}.bias": bias or biases}


@dataclass(frozen=True)
class Layout:
    """How a format stores the tensors of a table.

    Attributes:
        inputs_first: a pattern of foreign names whose matrices are stored [in, out]; others are [out, in], as torch's
            Linear stores them.
        interleaved: parameters whose rotary pairs are the neighbours (2i, 2i+1) of a head; ours are (i, i + H/2).
    """

    inputs_first: str = r"(?!)"
    interleaved: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Piece:
    """One matrix or vector of ours, as a part of a foreign tensor.

    Attributes:
        path: our parameter.
        index: where it is in the parameter's stack: its layer among those of the pattern entry, its expert.
        shape: of the matrix as we hold it, without padding of the vocabulary.
        inputs: the number of contracted axes; 0 for a table, None for a vector.
        interleaved: see `Layout`.
    """

    path: Path
    index: tuple[int, ...]
    shape: tuple[int, ...]
    inputs: int | None
    interleaved: bool

    def flat(self) -> tuple[int, ...]:
        """Its shape with one axis of inputs and one of outputs: (in, out), or (size,) for a vector."""
        if self.inputs is None:
            return (math.prod(self.shape),)
        if self.inputs == 0:
            return self.shape
        return math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :])

    def within(self, array: np.ndarray) -> np.ndarray:
        """The view of the whole parameter that is this piece."""
        return array[self.index][tuple(slice(size) for size in self.shape)]


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of a foreign checkpoint, and our parameters in it.

    Attributes:
        name: its foreign name.
        pieces: ours, in the order in which their outputs are concatenated.
        outputs_first: it is stored [out, in].
    """

    name: str
    pieces: tuple[Piece, ...]
    outputs_first: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the foreign checkpoint."""
        shapes = [self._stored(piece) for piece in self.pieces]
        return tuple(sum(s[self._axis] for s in shapes) if i == self._axis else n for i, n in enumerate(shapes[0]))

    @property
    def _axis(self) -> int:
        """The axis along which pieces are concatenated: their outputs."""
        return 0 if self.outputs_first or self.pieces[0].inputs is None else 1

    def _is_transposed(self, piece: Piece) -> bool:
        return self.outputs_first and bool(piece.inputs)

    def _stored(self, piece: Piece) -> tuple[int, ...]:
        flat = piece.flat()
        return flat[::-1] if self._is_transposed(piece) else flat

    def split(self, array: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
        """Each piece with its values as we hold them (a view where possible)."""
        start = 0
        for piece in self.pieces:
            stop = start + self._stored(piece)[self._axis]
            own = array[start:stop] if self._axis == 0 else array[:, start:stop]
            start = stop
            own = (own.T if self._is_transposed(piece) else own).reshape(piece.shape)
            if piece.interleaved:
                own = np.concatenate([own[..., 0::2], own[..., 1::2]], axis=-1)
            yield piece, own

    def join(self, values: Callable[[Path], np.ndarray]) -> np.ndarray:
        """The tensor as it is stored; `values` gives a whole parameter of ours."""
        parts = []
        for piece in self.pieces:
            own = piece.within(values(piece.path))
            if piece.interleaved:
                half = piece.shape[-1] // 2
                own = np.stack([own[..., :half], own[..., half:]], axis=-1).reshape(piece.shape)
            own = own.reshape(piece.flat())
            parts.append(own.T if self._is_transposed(piece) else own)
        return np.ascontiguousarray(np.concatenate(parts, axis=self._axis) if len(parts) > 1 else parts[0])


def foreign_tensors(model: Model, table: NameTable, layout: Layout) -> list[ForeignTensor]:
    """The tensors of a foreign checkpoint of `model`: the rows of the table whose parameters the model has.

    Raises:
        KeyError: the model has a parameter that the table does not name.
    """
    parameters = flatten_dict(model.parameters)
    unnamed = set(parameters)
    tensors = []
    for name, ours in table.items():
        for layer in range(model.config.num_layers) if "{layer}" in name else (None,):
            paths = [_path(path, layer, model) for path in ((ours,) if isinstance(ours, str) else ours)]
            # A table may have rows for experts beside those for a single feed-forward.
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
