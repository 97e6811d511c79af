"""A model of ours as a Hugging Face folder, or the reason why no architecture there computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.files import new_folder
from polygpt.interop.biases import with_biases, with_zero_biases
from polygpt.interop.huggingface.card import model_card
from polygpt.interop.huggingface.families import Family
from polygpt.interop.huggingface.folder import ARCHITECTURES, CONFIG, read_fields, tensors_of
from polygpt.interop.huggingface.safetensors_files import SHARD_BYTES, write_safetensors
from polygpt.interop.huggingface.text_files import CHAT_TEMPLATE, write_json, write_text_files
from polygpt.interop.same import computation, differences
from polygpt.interop.settings import Settings
from polygpt.interop.weights import written
from polygpt.model import Model, ModelConfig, Params
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
    """Writes a folder that transformers opens with the same logits; gives the architecture's name.

    Biases that the architecture has and the model has not are written as zeros. Padding of the vocabulary is left out.

    Args:
        folder: a new one.
        config: of the model.
        params: of the model.
        tokenizer: goes along, if there is one.
        dtype: of the weights; None keeps theirs.
        stop_tokens: ids beside the tokenizer's own at which generation ends.
        chat_template: goes along.
        facts: training figures and origin, for the model card.
        shard_bytes: at most so much goes into one file.

    Raises:
        RequestError: the folder exists, or a part has no counterpart there; it is named.
    """
    if folder.exists():
        raise RequestError(f"{folder}: exists already; choose another --out")
    family = choose_family(config)
    config, params = with_zero_biases(config, params) if family.zero_biases else (config, params)
    dtype = dtype or config.param_dtype
    settings = family.write(config)
    settings |= {"architectures": [family.architecture], "model_type": family.model_type, "torch_dtype": dtype}
    if tokenizer is not None and tokenizer.end_of_text is not None:
        settings |= {
            "eos_token_id": tokenizer.end_of_text,
            "bos_token_id": (*tokenizer.start, tokenizer.end_of_text)[0],
        }
    else:
        settings |= {"eos_token_id": None, "bos_token_id": None}
    with new_folder(folder) as partial:
        write_json(partial / CONFIG, settings)
        tensors = tensors_of(Model(config), family)
        write_safetensors(partial, written(tensors, params, jnp.dtype(dtype)), shard_bytes)
        if tokenizer is not None:
            write_text_files(partial, tokenizer, config.context_length, stop_tokens)
        if chat_template is not None:
            (partial / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        card = model_card(folder.name, family.architecture, config, facts or {}, tokenizer is not None)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return family.architecture


def choose_family(config: ModelConfig) -> Family:
    """The architecture whose configuration, read back, computes what `config` does.

    Raises:
        RequestError: there is none; what the nearest lacks is named.
    """
    if not config.num_layers:
        raise RequestError("no Hugging Face architecture computes this model: num_layers=0 has no counterpart")
    wanted = computation(config)
    nearest: tuple[int, str] | None = None
    for family in ARCHITECTURES.values():
        found = _read_back(family, config)
        if found is None:
            continue
        own = computation(with_biases(config)) if family.zero_biases else wanted
        differing = differences(own, found)
        if not differing:
            return family
        key, ours, theirs = differing[0]
        reason = f"{key}={ours} has no counterpart; {family.architecture}, the nearest, has {theirs}"
        # A part of another kind may differ in everything: it counts for several settings.
        distance = sum(5 if key.endswith(".kind") else 1 for key, *_ in differing)
        if nearest is None or distance < nearest[0]:
            nearest = distance, reason
    raise RequestError(f"no Hugging Face architecture computes this model: {nearest[1] if nearest else 'none is near'}")


def _read_back(family: Family, config: ModelConfig) -> dict[str, Any] | None:
    try:
        fields = read_fields(family, Settings(family.write(config), family.architecture))
        return computation(validate(ModelConfig, fields))
    except RequestError:  # its own parts do not fit this model's shape
        return None
