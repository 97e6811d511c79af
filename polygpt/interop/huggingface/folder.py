"""A Hugging Face folder, opened: config.json decides the model, safetensors fill it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.config import validate
from polygpt.errors import RequestError, suggest
from polygpt.interop.architecture import Architecture
from polygpt.interop.huggingface.architectures import ARCHITECTURES, GPT2
from polygpt.interop.huggingface.ignored import is_ignored
from polygpt.interop.huggingface.safetensors_files import SafetensorsFolder
from polygpt.interop.huggingface.text_files import read_chat_template, read_stop_tokens, read_tokenizer
from polygpt.interop.names import ForeignTensor, foreign_tensors
from polygpt.interop.settings import Settings, read_json
from polygpt.interop.stored import StoredModel
from polygpt.interop.weights import TensorSource, check, read_params
from polygpt.kernels import WeightType
from polygpt.model import Model, ModelConfig, Params

CONFIG = "config.json"
_TYPES = {architecture.model_type: architecture for architecture in ARCHITECTURES.values()}
_HEAD = "lm_head.weight"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_huggingface(folder: Path) -> bool:
    """Whether `folder` holds a config.json."""
    return (folder / CONFIG).is_file()


def open_huggingface(folder: Path) -> StoredModel:
    """The model in a Hugging Face folder; names, shapes and types of all tensors are checked, none is read.

    Parameters keep the type that most of the file's weights have, and activations take it, too.

    Raises:
        RequestError: the architecture, a setting or a tensor is unknown or does not fit; it is named.
    """
    settings = Settings(_flattened(read_json(folder / CONFIG)), str(folder / CONFIG))
    architecture = find_architecture(settings)
    source = SafetensorsFolder(folder)
    _check_counts(settings, len(source.tensors))
    fields = read_fields(architecture, settings)
    tokenizer = read_tokenizer(folder)
    dtype = _DTYPES.get(_commonest_dtype(source), "float32")
    config = validate(ModelConfig, fields | {"param_dtype": dtype, "compute_dtype": dtype}, settings.where)
    model = Model(config)
    wanted = tensors_of(model, architecture, source)
    check(source, wanted, ignored=rf"{architecture.ignored}|{_HEAD}")
    _check_tied_head(source, architecture, config)

    def read(asked: ModelConfig, on_progress: Callable[[int], None], weights: WeightType | None = None) -> Params:
        return read_params(model if asked == config else Model(asked), source, wanted, on_progress, weights)

    return StoredModel(
        config,
        read,
        tokenizer,
        read_stop_tokens(folder, settings),
        read_chat_template(folder),
        {"format": "huggingface", "architecture": architecture.name, "source": str(folder)},
    )


def _flattened(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as usual, from a file in which those of the shape lie below `model` (ONNX Runtime's tools write so)."""
    inner = values.get("model")
    if not isinstance(inner, dict) or "type" not in inner:
        return values
    rest = {name: value for name, value in values.items() if name != "model"}
    return {"model_type": inner["type"], **inner, **rest}


def find_architecture(settings: Settings) -> Architecture:
    """The architecture that a config.json names.

    Raises:
        RequestError: it is unknown.
    """
    named = settings.get("architectures") or []
    if isinstance(named, list) and named and isinstance(named[0], str):
        if named[0] in ARCHITECTURES:
            return ARCHITECTURES[named[0]]
        raise settings.error(f"the architecture {named[0]} is not known; {suggest(named[0], ARCHITECTURES)}")
    model_type = settings.get("model_type")
    # A few old files name neither, and GPT-2's settings are like nobody else's.
    architecture = _TYPES.get(model_type) or (GPT2 if model_type is None and "n_embd" in settings.values else None)
    if architecture is None:
        raise settings.error(f"the model type {model_type!r} is not known; {suggest(str(model_type), _TYPES)}")
    return architecture


def read_fields(architecture: Architecture, settings: Settings) -> dict[str, Any]:
    """The fields of a `ModelConfig` that a config.json says.

    Raises:
        RequestError: a setting is unknown, missing, or asks for what there is not here.
    """
    settings.ignore(*(key for key in settings.values if is_ignored(key, architecture.model_type)))
    return architecture.read(settings)


def tensors_of(model: Model, architecture: Architecture, source: TensorSource | None = None) -> list[ForeignTensor]:
    """The tensors in which this architecture holds `model`, named as `source` names them."""
    names = architecture.names
    if source is not None and not any(name.startswith(architecture.prefix) for name in source.tensors):
        names = {name.removeprefix(architecture.prefix): ours for name, ours in names.items()}
    return foreign_tensors(model, names, architecture.layout)


def _commonest_dtype(source: TensorSource) -> str:
    sizes: dict[str, int] = {}
    for shape, dtype in source.tensors.values():
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    return max(sizes, key=sizes.get, default="F32")


def _check_counts(settings: Settings, tensors: int) -> None:
    """Layers and experts are gone through one by one: there must be a tensor for each."""
    for name in ("num_hidden_layers", "n_layer", "num_local_experts"):
        value = settings.values.get(name)
        if type(value) is int and value > tensors:
            raise settings.error(f"'{name}' is {value:,}, but the folder has only {tensors:,} tensors")


def _check_tied_head(source: SafetensorsFolder, architecture: Architecture, config: ModelConfig) -> None:
    """A tied model's file may hold the head as well: then as the embedding once more."""
    if config.head != "tied" or _HEAD not in source.tensors:
        return
    embedding = next(name for name, ours in architecture.names.items() if ours == "embedding")
    if embedding not in source.tensors:
        embedding = embedding.removeprefix(architecture.prefix)
    same = source.tensors.get(embedding) == source.tensors[_HEAD]
    if not same or not np.array_equal(source.read(embedding).view(np.uint8), source.read(_HEAD).view(np.uint8)):
        raise RequestError(
            f"{source.where}: {_HEAD} differs from {embedding}, though the configuration says that they are tied; "
            "set tie_word_embeddings to false in its config.json"
        )
