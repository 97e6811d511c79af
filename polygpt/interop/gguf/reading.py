"""Opens a GGUF file: its metadata give the model, its tensors the weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.config import validate
from polygpt.errors import RequestError, suggest
from polygpt.interop.architecture import Architecture
from polygpt.interop.gguf.architectures import ARCHITECTURES, EMBEDDING, HEAD, PSEUDO, ROPE_FREQS, tensor_settings
from polygpt.interop.gguf.container import DTYPES, MAGIC, GGUFFile
from polygpt.interop.gguf.experts import Unstacked
from polygpt.interop.names import foreign_tensors
from polygpt.interop.stored import StoredModel
from polygpt.interop.weights import check_counts, check_tensors, read_params
from polygpt.model import ModelConfig, model_of
from polygpt.settings import Settings
from polygpt.tokenizers import read_gguf_text

_ROPE_FREQS_LIMIT = 1 << 12
_NOT_WEIGHTS = r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd|blk\.\d+\.attn\.rot_embd"


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins as GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> StoredModel:
    """The model in a GGUF file. Names, shapes and types of all tensors are checked; only the smallest are read yet.

    Parameters and activations are float32 whatever the file's types are: quantised values are dequantised.

    Raises:
        RequestError: the architecture, a setting, a tensor or the tokenizer is unknown or damaged; it is named.
    """
    file = GGUFFile(path)
    architecture = _find(file)
    source = Unstacked(file)
    settings = _settings_of(file, architecture, source)
    check_counts(settings, len(source.tensors), "block_count", "expert_count")
    config = validate(ModelConfig, read_fields(architecture, settings), file.where)
    tensors = foreign_tensors(model_of(config), architecture.names, architecture.layout)
    check_tensors(source, tensors, rf"{_NOT_WEIGHTS}|output\.weight" if config.head == "tied" else _NOT_WEIGHTS, DTYPES)
    text = read_gguf_text(file.metadata, file.where)
    if text.tokenizer is not None and text.tokenizer.vocab_size > config.vocab_size:
        raise RequestError(f"{path}: {text.tokenizer.vocab_size} tokens, but {EMBEDDING} has {config.vocab_size} rows")
    facts = {"format": "gguf", "architecture": architecture.name, "source": str(path)}
    name = file.metadata.get("general.name")
    facts |= {"name": name} if isinstance(name, str) else {}
    return StoredModel(config, partial(read_params, source, tensors), *text, facts)


def _find(file: GGUFFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        hint = suggest(str(name), ARCHITECTURES)
        raise RequestError(f"{file.where}: the architecture {name!r} is not known; {hint}")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise RequestError(f"{file.where}: one of {file.metadata['split.count']} files of a model; merge them first")
    return ARCHITECTURES[name]


def _settings_of(file: GGUFFile, architecture: Architecture, source: Unstacked) -> Settings:
    """The settings under the architecture's name, and those that its tensors tell.

    Raises:
        RequestError: there is no embedding, or a setting differs from layer to layer.
    """
    prefix = f"{architecture.name}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    for name, value in own.items():
        if isinstance(value, list) and value:  # one entry per layer
            if any(entry != value[0] for entry in value):
                raise RequestError(f"{file.where}: '{prefix}{name}' differs from layer to layer; it must not")
            own[name] = value[0]
    tensors = dict(source.tensors)
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].shape) != 2:
        raise RequestError(f"{file.where}: the tensor {EMBEDDING} is missing, or is not a matrix")
    if HEAD in tensors and _same(file, HEAD, EMBEDDING):
        del tensors[HEAD]  # older converters write a tied head once more
    return Settings(own | tensor_settings(tensors, _rope_freqs(file)), file.where, prefix)


def read_fields(architecture: Architecture, settings: Settings) -> dict[str, Any]:
    """The fields of a `ModelConfig` for a file's settings.

    Raises:
        RequestError: a setting is unknown, missing, or asks for something that does not exist here.
    """
    # An architecture need not know every pseudo-setting: tensors that it lacks are refused by `check_tensors`.
    settings.ignore("tensor_data_layout", *(name for name in settings.values if name.startswith(PSEUDO)))
    return architecture.read(settings)


def _same(file: GGUFFile, first: str, second: str) -> bool:
    """Whether two tensors have the same type and bytes."""
    if file.tensors[first] != file.tensors.get(second):
        return False
    one, other = file.raw(first), file.raw(second)
    return np.array_equal(one[:4096], other[:4096]) and np.array_equal(one, other)


def _rope_freqs(file: GGUFFile) -> np.ndarray | None:
    info = file.tensors.get(ROPE_FREQS)
    if info is None:
        return None
    if len(info.shape) != 1 or info.shape[0] > _ROPE_FREQS_LIMIT or info.dtype != "F32":
        raise RequestError(f"{file.where}: the tensor {ROPE_FREQS} is {info.dtype} {list(info.shape)}, not F32 [H/2]")
    return file.read(ROPE_FREQS)
