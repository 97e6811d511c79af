"""Opens a Hugging Face folder: config.json gives the model, safetensors files its weights."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.config import validate
from polygpt.errors import RequestError, suggest
from polygpt.interop.architecture import Architecture
from polygpt.interop.huggingface.gpt2 import GPT2
from polygpt.interop.huggingface.ignored import is_ignored
from polygpt.interop.huggingface.llama import LLAMAS
from polygpt.interop.huggingface.safetensors_files import SafetensorsFolder
from polygpt.interop.huggingface.text_files import read_chat_template, read_stop_tokens, read_tokenizer
from polygpt.interop.names import ForeignTensor, foreign_tensors
from polygpt.interop.stored import StoredModel
from polygpt.interop.weights import TensorSource, check_counts, check_tensors, read_params
from polygpt.model import ModelConfig, model_of
from polygpt.settings import Settings, read_json

CONFIG = "config.json"
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in (GPT2, *LLAMAS)}
_TYPES = {architecture.model_type: architecture for architecture in ARCHITECTURES.values()}
_HEAD = "lm_head.weight"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_huggingface(folder: Path) -> bool:
    """Whether `folder` holds a config.json."""
    return (folder / CONFIG).is_file()


def open_huggingface(folder: Path) -> StoredModel:
    """The model in a Hugging Face folder. Names, shapes and types of all tensors are checked; no weight is read yet.

    Parameters and activations have the type of most of the stored weights.

    Raises:
        RequestError: the architecture, a setting or a tensor is unknown or does not fit; it is named.
    """
    settings = Settings(_flattened(read_json(folder / CONFIG)), str(folder / CONFIG))
    architecture = find_architecture(settings)
    source = SafetensorsFolder(folder)
    check_counts(settings, len(source.tensors), "num_hidden_layers", "n_layer", "num_local_experts")
    fields = read_fields(architecture, settings)
    tokenizer = read_tokenizer(folder)
    dtype = _DTYPES.get(_commonest_dtype(source), "float32")
    config = validate(ModelConfig, fields | {"param_dtype": dtype, "compute_dtype": dtype}, settings.where)
    tensors = tensors_of(config, architecture, source)
    check_tensors(source, tensors, ignored=rf"{architecture.ignored}|{_HEAD}")
    _check_tied_head(source, architecture, config)
    return StoredModel(
        config,
        partial(read_params, source, tensors),
        tokenizer,
        read_stop_tokens(folder, settings),
        read_chat_template(folder),
        {"format": "huggingface", "architecture": architecture.name, "source": str(folder)},
    )


def _flattened(values: dict[str, Any]) -> dict[str, Any]:
    """The usual settings from a file in which those of the shape are nested in `model` (as ONNX Runtime writes it)."""
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
    named, model_type = settings.get("architectures") or [], settings.get("model_type")
    by_name = by_type = _TYPES.get(model_type) if isinstance(model_type, str) else None
    if isinstance(named, list) and named and isinstance(named[0], str):
        # A file of the bare decoder names its class: LlamaModel, GPT2Model.
        by_name = next((a for a in ARCHITECTURES.values() if named[0] in (a.name, _decoder_class(a))), None)
        if by_name is None:
            raise settings.error(f"the architecture {named[0]} is not known; {suggest(named[0], ARCHITECTURES)}")
        if isinstance(model_type, str) and by_type is None:
            raise settings.error(
                f"the model type {model_type!r} is not known and contradicts the architecture {named[0]}, whose type "
                f"is {by_name.model_type!r}"
            )
    # Of two, transformers follows the type. A few old files have neither, and only GPT-2 has its settings.
    old = GPT2 if model_type is None and "n_embd" in settings.values else None
    architecture = by_type or by_name or old
    if architecture is None:
        raise settings.error(f"the model type {model_type!r} is not known; {suggest(str(model_type), _TYPES)}")
    return architecture


def _decoder_class(architecture: Architecture) -> str:
    return re.sub("(ForCausalLM|LMHeadModel)$", "Model", architecture.name)


def read_fields(architecture: Architecture, settings: Settings) -> dict[str, Any]:
    """The fields of a `ModelConfig` for a config.json.

    Raises:
        RequestError: a setting is unknown, missing, or asks for something that does not exist here.
    """
    settings.require("pruned_heads", {}, "models with pruned heads are not supported")
    settings.require("add_cross_attention", False, "cross attention is not supported")
    settings.ignore(*(key for key in settings.values if is_ignored(key, architecture.model_type)))
    return architecture.read(settings)


def tensors_of(
    config: ModelConfig, architecture: Architecture, source: TensorSource | None = None
) -> list[ForeignTensor]:
    """The tensors in which this architecture stores a model, named as `source` names them."""
    names = architecture.names
    if source is not None and not any(name.startswith(architecture.prefix) for name in source.tensors):
        names = {name.removeprefix(architecture.prefix): ours for name, ours in names.items()}
    return foreign_tensors(model_of(config), names, architecture.layout)


def _commonest_dtype(source: TensorSource) -> str:
    sizes: dict[str, int] = {}
    for shape, dtype in source.tensors.values():
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    return max(sizes, key=sizes.get, default="F32")


def _check_tied_head(source: SafetensorsFolder, architecture: Architecture, config: ModelConfig) -> None:
    """A tied model's file may store the head as well; it must then equal the embedding."""
    if config.head != "tied" or _HEAD not in source.tensors:
        return
    embedding = next(name for name, ours in architecture.names.items() if ours == "embedding")
    if embedding not in source.tensors:
        embedding = embedding.removeprefix(architecture.prefix)
    same = source.tensors.get(embedding) == source.tensors[_HEAD]
    if not same or not np.array_equal(source.read(embedding).view(np.uint8), source.read(_HEAD).view(np.uint8)):
        raise RequestError(
            f"{source.where}: {_HEAD} differs from {embedding}, although the configuration says that they are tied; "
            "set tie_word_embeddings to false in its config.json"
        )
