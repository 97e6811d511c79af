"""A GGUF file, opened: its metadata decide the model, its tensors fill it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polygpt.config import validate
from polygpt.errors import RequestError, suggest
from polygpt.interop.architecture import Architecture
from polygpt.interop.gguf.architectures import ARCHITECTURES, EMBEDDING, HEAD, PSEUDO, ROPE_FREQS, tensor_settings
from polygpt.interop.gguf.container import DTYPES, MAGIC, GGUFFile
from polygpt.interop.gguf.experts import Unstacked
from polygpt.interop.gguf.tokenizer_in import read_text
from polygpt.interop.names import foreign_tensors
from polygpt.interop.settings import Settings
from polygpt.interop.stored import StoredModel
from polygpt.interop.weights import check, read_params
from polygpt.model import Model, ModelConfig, Params, WeightType

_ROPE_FREQS_LIMIT = 1 << 12


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins as GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> StoredModel:
    """The model in a GGUF file; names, shapes and types of all tensors are checked, none but the smallest is read.

    Parameters and activations are float32 whatever the file's types are: quantised values are spelled out.

    Raises:
        RequestError: the architecture, a setting, a tensor or the tokenizer is unknown or damaged; it is named.
    """
    file = GGUFFile(path)
    architecture = _find(file)
    source = Unstacked(file)
    tensors = dict(source.tensors)
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].shape) != 2:
        raise RequestError(f"{path}: the tensor {EMBEDDING} is missing, or is not a matrix")
    if HEAD in tensors and _same(file, HEAD, EMBEDDING):
        del tensors[HEAD]  # older converters write a tied head once more
    settings = _own(file.metadata, f"{architecture.name}.", file.where) | tensor_settings(tensors, _rope_freqs(file))
    fields = read_fields(architecture, Settings(settings, file.where, f"{architecture.name}."))
    _check_counts(file, source, fields)
    config = validate(ModelConfig, fields, file.where)
    wanted = foreign_tensors(Model(config), architecture.names, architecture.layout)
    check(source, wanted, _ignored(fields), DTYPES)
    text = read_text(file.metadata, file.where)
    if text.tokenizer is not None and text.tokenizer.vocab_size > config.vocab_size:
        raise RequestError(
            f"{path}: {text.tokenizer.vocab_size} tokens, where {EMBEDDING} has {config.vocab_size} rows"
        )

    def read(asked: ModelConfig, on_progress: Callable[[int], None], weights: WeightType | None = None) -> Params:
        return read_params(Model(asked), source, wanted, on_progress, weights)

    facts = {"format": "gguf", "architecture": architecture.name, "source": str(path)}
    name = file.metadata.get("general.name")
    facts |= {"name": name} if isinstance(name, str) else {}
    return StoredModel(config, read, *text, facts)


def _check_counts(file: GGUFFile, source: Unstacked, fields: Mapping[str, Any]) -> None:
    """Refuses more layers or experts than there are tensors, before anything is made for each of them."""
    counts = {"layers": fields["num_layers"], "experts": fields["feedforward"].get("num_experts", 0)}
    for what, count in counts.items():
        if count > len(source.tensors):
            raise RequestError(f"{file.where}: {count:,} {what}, with {len(source.tensors)} tensors; it is damaged")


def _find(file: GGUFFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        hint = suggest(str(name), ARCHITECTURES)
        raise RequestError(f"{file.where}: the architecture {name!r} is not known; {hint}")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise RequestError(f"{file.where}: it is one of {file.metadata['split.count']} files of a model; merge them")
    return ARCHITECTURES[name]


def _own(metadata: Mapping[str, Any], prefix: str, where: str) -> dict[str, Any]:
    """The settings below the architecture's name. Some may be a list with one entry per layer, all equal.

    Raises:
        RequestError: the entries differ.
    """
    own = {}
    for key, value in metadata.items():
        if not key.startswith(prefix):
            continue
        if isinstance(value, list) and value:
            if any(entry != value[0] for entry in value):
                raise RequestError(f"{where}: '{key}' differs from layer to layer, which is not supported")
            value = value[0]
        own[key.removeprefix(prefix)] = value
    return own


def read_fields(architecture: Architecture, settings: Settings) -> dict[str, Any]:
    """The fields of a `ModelConfig` that the file states.

    Raises:
        RequestError: a setting is unknown, missing, or asks for something that does not exist here.
    """
    # Tensors that an architecture does not have are refused where tensors are compared.
    settings.ignore("tensor_data_layout", *(name for name in settings.values if name.startswith(PSEUDO)))
    return architecture.read(settings)


def _same(file: GGUFFile, first: str, second: str) -> bool:
    """Whether two tensors are the same, type and bytes."""
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


def _ignored(fields: Mapping[str, Any]) -> str:
    """A pattern of tensors that hold no weights: rotary factors, and what belongs to a tied head."""
    angles = r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd|blk\.\d+\.attn\.rot_embd"
    return rf"{angles}|output\.weight" if fields["head"] == "tied" else angles
