"""Tensors of a foreign checkpoint into our parameters, one at a time, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from polygpt.errors import RequestError, suggest
from polygpt.interop.names import ForeignTensor, Path
from polygpt.kernels import ALIGNMENT, WeightType, pack_rows
from polygpt.model import Model, ParameterInfo, Params

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class TensorInfo(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


class TensorSource(Protocol):
    """A foreign checkpoint's tensors by name."""

    where: str
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor, in a floating type; memory it takes is given back with the array."""
        ...


def check(source: TensorSource, wanted: Sequence[ForeignTensor], ignored: str, dtypes: Iterable[str] = FLOATS) -> None:
    """Compares names, shapes and types with what the configuration says, before anything is allocated.

    Args:
        source: the checkpoint.
        wanted: the tensors that the model needs.
        ignored: a pattern of names that hold no weights.
        dtypes: the types that can be read.

    Raises:
        RequestError: a tensor is missing, unknown, transposed, or of another shape or type; it is named.
    """
    dtypes = tuple(dtypes)
    expected = {tensor.name: tensor.shape for tensor in wanted}
    for name, shape in expected.items():
        info = source.tensors.get(name)
        if info is None:
            near = suggest(name, source.tensors.keys() - expected.keys())
            hint = f"; {near}" if near.startswith("did you") else ""
            raise RequestError(f"{source.where}: the tensor {name} is missing{hint}")
        if info.shape != shape:
            turned = " (it is transposed)" if info.shape == shape[::-1] else ""
            raise RequestError(
                f"{source.where}: the tensor {name} is {list(info.shape)}; by the configuration it must be "
                f"{list(shape)}{turned}"
            )
    for name, info in source.tensors.items():
        if name not in expected:
            if not re.fullmatch(ignored, name):
                raise RequestError(f"{source.where}: the tensor {name} {list(info.shape)} is not known for this model")
        elif info.dtype not in dtypes:
            raise RequestError(f"{source.where}: the tensor {name} is {info.dtype}; known: {', '.join(dtypes)}")


def read_params(
    model: Model,
    source: TensorSource,
    wanted: Sequence[ForeignTensor],
    on_progress: Callable[[int], None] = int,
    weights: WeightType | None = None,
) -> Params:
    """The parameters of `model`, filled tensor by tensor: beside them only the tensors in hand are in memory.

    The model may have more ids than the tensors (padding, which is 0) and fewer learned positions. `on_progress` is
    given the number of weights after each tensor. `weights`: packed in this type, as `Model.pack` would.
    """
    infos = flatten_dict(model.parameters)
    packed = model.packable if weights else frozenset()
    rows, whole = {}, {}
    for path, info in infos.items():
        if path in packed:
            rows[path], whole[path] = _empty_rows(info, weights, model.config.vocab_padding)
        else:
            whole[path] = _empty(info.shape, info.dtype, model.config.vocab_padding)

    def fill(tensor: ForeignTensor) -> int:
        values = source.read(tensor.name)
        for piece, own in tensor.split(values):
            place = piece.within(whole[piece.path])
            place[...] = own[tuple(slice(size) for size in place.shape)]
        return values.size

    # Two at a time: copying and turning a matrix leave Python's lock to others. The largest first, while little of
    # the memory that they go to has been touched: so the peak is hardly above the weights.
    ordered = sorted(wanted, key=lambda tensor: -math.prod(tensor.shape))
    with ThreadPoolExecutor(2) as pool:
        for size in pool.map(fill, ordered):
            on_progress(size)
    device = jax.local_devices()[0]
    # On a CPU XLA takes over the very memory; elsewhere each leaf's is given back once it is on the device.
    leaves: dict[Path, Any] = {}
    for path, info in infos.items():
        values = whole.pop(path)
        if path in packed:
            leaves[path] = pack_rows(rows.pop(path), *info.sides, weights, device)
        else:
            leaves[path] = jax.device_put(values, device, may_alias=True)
        del values
    return unflatten_dict(leaves)


def written(wanted: Sequence[ForeignTensor], params: Params, dtype: np.dtype) -> Iterable[tuple[str, np.ndarray]]:
    """Each foreign tensor with its values, one at a time."""
    flat = flatten_dict(params)

    def values(path: Path) -> np.ndarray:
        return np.asarray(flat[path])

    for tensor in wanted:
        yield tensor.name, tensor.join(values).astype(dtype)


def _empty_rows(info: ParameterInfo, weights: WeightType, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Memory of a packed parameter a row an output, and the same memory seen as the parameter."""
    dtype = np.dtype(np.float32 if weights == "int8" else weights)
    if not info.inputs:
        table = _empty(info.shape, dtype, padded)
        return table, table
    inputs, outputs = map(math.prod, info.sides)
    rows = _empty((*info.shape[: info.stack], outputs, inputs), dtype, padded)
    return rows, rows.swapaxes(-1, -2).reshape(info.shape)  # a view: axes are split, none is joined


def _empty(shape: tuple[int, ...], dtype: Any, padded: bool) -> np.ndarray:
    """Memory that begins at a multiple of `ALIGNMENT`."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = (np.zeros if padded else np.empty)(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
