"""Writes a model as a GGUF file, or says why llama.cpp does not compute it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from polygpt.errors import RequestError, suggest
from polygpt.files import new_file
from polygpt.interop.architecture import Architecture, counterpart
from polygpt.interop.biases import with_zero_biases
from polygpt.interop.gguf.architectures import ARCHITECTURES, PSEUDO, ROPE_FREQS
from polygpt.interop.gguf.container import shortest
from polygpt.interop.gguf.experts import stack, stacked_name
from polygpt.interop.gguf.reading import read_fields
from polygpt.interop.gguf.rope import FACTORS
from polygpt.interop.names import ForeignTensor, foreign_tensors
from polygpt.interop.weights import written_tensors
from polygpt.model import ModelConfig, Params, model_of
from polygpt.settings import Settings
from polygpt.tokenizers import Tokenizer, write_gguf_text

# Our name of a type -> the type of matrices, and its number in `general.file_type`.
DTYPES = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# llama.cpp adds and compares these without converting them.
_ALWAYS_F32 = ("position_embd.weight", "ffn_gate_inp.weight")


def export_gguf(
    path: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "f32",
    stop_tokens: tuple[int, ...] = (),
    chat_template: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> str:
    """Writes a file that llama.cpp runs with the same logits; returns the architecture's name.

    Biases that the architecture has and the model lacks are written as zeros. Padding of the vocabulary is left out.

    Args:
        path: must not exist.
        config: of the model.
        params: of the model.
        tokenizer: is written too, if there is one.
        dtype: of matrices: f32, f16, bf16 or q8_0 (rows whose length is not a multiple of 32 are then f16). Vectors,
            learned positions and routers are always f32.
        stop_tokens: ids at which generation ends, besides the tokenizer's own.
        chat_template: is written too, if there is one.
        facts: training figures and origin; strings and numbers among them are written under `polygpt.`.

    Raises:
        RequestError: `path` exists, or a part of the model has no counterpart in llama.cpp; it is named.
    """
    if path.exists():
        raise RequestError(f"{path}: exists already; choose another name")
    if dtype not in DTYPES:
        raise RequestError(f"the type '{dtype}' is not known for GGUF; {suggest(dtype, DTYPES)}")
    architecture = choose_architecture(config)
    config, params = with_zero_biases(config, params) if architecture.zero_biases else (config, params)
    settings = architecture.write(config)
    metadata = _general(path.stem, dtype, facts or {})
    metadata |= {f"{architecture.name}.{name}": v for name, v in settings.items() if not name.startswith(PSEUDO)}
    metadata |= write_gguf_text(tokenizer, config.vocab_size - config.vocab_padding, stop_tokens, chat_template)
    tensors = foreign_tensors(model_of(config), architecture.names, architecture.layout)
    factors = {ROPE_FREQS: settings[FACTORS]} if FACTORS in settings else {}
    shapes = {name: values.shape for name, values in factors.items()} | _shapes(tensors)
    values = itertools.chain(factors.items(), stack(written_tensors(tensors, params, np.dtype(np.float32))))
    with new_file(path) as partial:
        _write(partial, architecture.name, metadata, shapes, DTYPES[dtype][0], values)
    return architecture.name


def choose_architecture(config: ModelConfig) -> Architecture:
    """The architecture of llama.cpp that computes what `config` does.

    Raises:
        RequestError: there is none; what the nearest lacks is named.
    """

    def read(architecture: Architecture, settings: dict[str, Any]) -> dict[str, Any]:
        stored = {name: _stored(name, value) for name, value in settings.items()}
        return read_fields(architecture, Settings(stored, architecture.name))

    return counterpart(config, ARCHITECTURES.values(), read, "llama.cpp has no architecture for this model")


def _stored(name: str, value: Any) -> Any:
    """A setting's value after it is stored in 32 bits."""
    if type(value) is int and not 0 <= value < 1 << 32:
        raise RequestError(f"{name}={value} is too large for GGUF")
    return shortest(value) if isinstance(value, float) else value


def _general(name: str, dtype: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in facts.items() if type(value) in (str, int, float)}
    largest = float(np.finfo(np.float32).max)
    return {
        "general.type": "model",
        "general.name": str(facts.get("name", name)),
        "general.file_type": int(DTYPES[dtype][1]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{
            f"polygpt.{key}": value if type(value) is float and abs(value) <= largest else str(value)
            for key, value in kept.items()
        },
    }


def _shapes(tensors: Sequence[ForeignTensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors as written, with each layer's experts stacked."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        name = stacked_name(tensor.name)
        if name == tensor.name:
            shapes[name] = tensor.shape
        else:
            shapes[name] = (shapes.get(name, (0,))[0] + 1, *tensor.shape)
    return shapes


def _kind(name: str, shape: tuple[int, ...], wanted: Kind) -> Kind:
    """The type in which a tensor is stored."""
    if len(shape) < 2 or name.endswith(_ALWAYS_F32):
        return Kind.F32
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return wanted if shape[-1] % block == 0 else Kind.F16


def _write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Kind,
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes the header, then one tensor after another."""
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, shape in shapes.items():
            kind = _kind(name, shape, wanted)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, values in _in_order(shapes, tensors):
            writer.write_tensor_data(_encoded(name, values, _kind(name, values.shape, wanted)))
    finally:
        writer.close()


def _in_order(
    shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    for expected, (name, values) in zip(shapes, tensors, strict=True):
        assert (name, values.shape) == (expected, shapes[expected]), f"{name} {values.shape} written out of order"
        yield name, values


def _encoded(name: str, values: np.ndarray, kind: Kind) -> np.ndarray:
    if kind in (Kind.F16, Kind.Q8_0) and values.size:
        # Q8_0 stores the scale of a block, its largest value / 127, in 16 bits.
        largest = float(np.abs(values).max()) / (127 if kind == Kind.Q8_0 else 1)
        if not largest <= float(np.finfo(np.float16).max):
            raise RequestError(f"the tensor {name} has values too large for {kind.name.lower()}; choose bf16 or f32")
    return np.ascontiguousarray(gguf.quantize(values, kind))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    if isinstance(value, str):
        writer.add_string(key, value.encode("utf-8", "replace").decode())  # a lone surrogate has no UTF-8
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds[type(value)](key, value)
