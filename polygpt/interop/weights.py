"""Copies the tensors of a foreign checkpoint into our parameters, and back, one at a time."""

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
from jaxtyping import PyTree

from polygpt.errors import RequestError, suggest
from polygpt.interop.names import ForeignTensor, Path
from polygpt.kernels import ALIGNMENT, QUANTIZED, WeightType, pack_rows
from polygpt.model import ModelConfig, ParameterInfo, Params, model_of
from polygpt.settings import Settings

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class TensorInfo(NamedTuple):
    """What a file says about a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


class TensorSource(Protocol):
    """A foreign checkpoint's tensors by name."""

    where: str
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """The values of one tensor, in a floating type. Its memory is freed with the array."""
        ...


def check_counts(settings: Settings, tensors: int, *names: str) -> None:
    """Refuses more layers or experts (the settings `names`) than there are tensors, before anything loops over them."""
    for name in names:
        value = settings.values.get(name)
        if type(value) is int and value > tensors:
            raise settings.error(f"'{name}' is {value:,}, but there are only {tensors:,} tensors")


def check_tensors(
    source: TensorSource, wanted: Sequence[ForeignTensor], ignored: str, dtypes: Iterable[str] = FLOATS
) -> None:
    """Compares names, shapes and types with the configuration before anything is allocated.

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
            hint = " (it is transposed)" if info.shape == shape[::-1] else ""
            raise RequestError(
                f"{source.where}: the tensor {name} is {list(info.shape)}; by the configuration it must be "
                f"{list(shape)}{hint}"
            )
    for name, info in source.tensors.items():
        if name not in expected:
            if not re.fullmatch(ignored, name):
                raise RequestError(f"{source.where}: the tensor {name} {list(info.shape)} is not known for this model")
        elif info.dtype not in dtypes:
            raise RequestError(f"{source.where}: the tensor {name} is {info.dtype}; known: {', '.join(dtypes)}")


def read_params(
    source: TensorSource,
    wanted: Sequence[ForeignTensor],
    config: ModelConfig,
    on_progress: Callable[[int], None] = int,
    weights: WeightType | None = None,
    shardings: PyTree | None = None,
) -> Params:
    """The parameters of a model, filled tensor by tensor, so that only few tensors are in memory beside them.

    Args:
        source: the checkpoint.
        wanted: its tensors.
        config: of the model, which may have more ids than the tensors (padding, filled with 0) and fewer learned
            positions.
        on_progress: is given the number of weights after each tensor.
        weights: pack them in this type, as `Model.pack` would.
        shardings: where each parameter goes; None is the first device.
    """
    model = model_of(config)
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
            target = piece.within(whole[piece.path])
            target[...] = own[tuple(slice(size) for size in target.shape)]
        return values.size

    # Two at a time: copying and transposing release the interpreter's lock. The largest first, while few pages of the
    # parameters have been touched, so that the peak is hardly above the weights.
    ordered = sorted(wanted, key=lambda tensor: -math.prod(tensor.shape))
    with ThreadPoolExecutor(2) as pool:
        for size in pool.map(fill, ordered):
            on_progress(size)
    device = jax.local_devices()[0]
    # On a CPU XLA adopts the memory itself; elsewhere the memory of each leaf is freed once it is on the device.
    placed = dict.fromkeys(infos, device) if shardings is None else flatten_dict(shardings)
    leaves: dict[Path, Any] = {}
    for path, info in infos.items():
        values = whole.pop(path)
        if path in packed:
            leaves[path] = pack_rows(rows.pop(path), *info.sides, weights, device)
        else:
            leaves[path] = jax.device_put(values, placed[path], may_alias=True)
        del values
    return unflatten_dict(leaves)


def written_tensors(
    wanted: Sequence[ForeignTensor], params: Params, dtype: np.dtype
) -> Iterable[tuple[str, np.ndarray]]:
    """Each foreign tensor with its values, one at a time."""
    flat = flatten_dict(params)

    def values(path: Path) -> np.ndarray:
        return np.asarray(flat[path])

    for tensor in wanted:
        yield tensor.name, tensor.join(values).astype(dtype)


def _empty_rows(info: ParameterInfo, weights: WeightType, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Memory of a packed parameter, stored [out, in], and a view of it in the parameter's shape."""
    dtype = np.dtype(np.float32 if weights in QUANTIZED else weights)
    if not info.inputs:
        table = _empty(info.shape, dtype, padded)
        return table, table
    inputs, outputs = map(math.prod, info.sides)
    rows = _empty((*info.shape[: info.stack], outputs, inputs), dtype, padded)
    return rows, rows.swapaxes(-1, -2).reshape(info.shape)  # a view, since axes are split and never joined


def _empty(shape: tuple[int, ...], dtype: Any, padded: bool) -> np.ndarray:
    """Memory aligned to `ALIGNMENT`."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = (np.zeros if padded else np.empty)(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
