"""Writes a model as a Hugging Face folder, or says why no architecture there computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from polygpt.errors import RequestError
from polygpt.files import check_checkpoint_path, new_folder
from polygpt.interop.architecture import Architecture, counterpart
from polygpt.interop.biases import with_zero_biases
from polygpt.interop.huggingface.card import model_card
from polygpt.interop.huggingface.folder import ARCHITECTURES, CONFIG, read_fields, tensors_of
from polygpt.interop.huggingface.safetensors_files import SHARD_BYTES, write_safetensors
from polygpt.interop.huggingface.text_files import CHAT_TEMPLATE, role_ids, write_json, write_text_files
from polygpt.interop.weights import written_tensors
from polygpt.model import ModelConfig, Params
from polygpt.settings import Settings
from polygpt.tokenizers import Tokenizer


def export_huggingface(
    folder: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str | None = None,
    stop_tokens: tuple[int, ...] = (),
    chat_template: str | None = None,
    facts: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes a folder that transformers opens with the same logits; returns the architecture's name.

    Biases that the architecture has and the model lacks are written as zeros. Padding of the vocabulary is left out.

    Args:
        folder: must not exist.
        config: of the model.
        params: of the model.
        tokenizer: is written too, if there is one.
        dtype: of the stored weights; None keeps their type.
        stop_tokens: ids at which generation ends, besides the tokenizer's own.
        chat_template: is written too, if there is one.
        facts: training figures and origin, for the model card.
        shard_bytes: the size limit of one file.

    Raises:
        RequestError: the folder exists, or a part of the model has no counterpart; it is named.
    """
    if folder.exists():
        raise RequestError(f"{folder}: exists already; choose another --out")
    check_checkpoint_path(folder)
    architecture = choose_family(config)
    config, params = with_zero_biases(config, params) if architecture.zero_biases else (config, params)
    dtype = dtype or config.param_dtype
    settings = architecture.write(config)
    settings |= {"architectures": [architecture.name], "model_type": architecture.model_type, "torch_dtype": dtype}
    settings |= role_ids(tokenizer, stop_tokens)
    with new_folder(folder) as partial:
        write_json(partial / CONFIG, settings)
        tensors = tensors_of(config, architecture)
        write_safetensors(partial, written_tensors(tensors, params, jnp.dtype(dtype)), shard_bytes)
        if tokenizer is not None:
            write_text_files(partial, tokenizer, config.context_length, stop_tokens)
        if chat_template is not None:
            (partial / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        card = model_card(folder.name, architecture.name, config, facts or {}, tokenizer is not None)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return architecture.name


def choose_family(config: ModelConfig) -> Architecture:
    """The Hugging Face architecture that computes what `config` does.

    Raises:
        RequestError: there is none; what the nearest lacks is named.
    """

    def read(architecture: Architecture, settings: dict[str, Any]) -> dict[str, Any]:
        return read_fields(architecture, Settings(settings, architecture.name))

    return counterpart(config, ARCHITECTURES.values(), read, "no Hugging Face architecture computes this model")
