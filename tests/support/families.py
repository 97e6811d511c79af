"""Tiny models of every architecture that can be imported, as transformers builds them.

What is compared live (`tests/parity`) and what `tests/interop/make_references.py` stores are the same models. Torch and
transformers are imported by the functions that need them: the names alone need neither.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LENGTH, VOCAB = 20, 50
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"sliding_window": 7}  # shorter than LENGTH


class Foreign(NamedTuple):
    """A model of transformers': the name of its configuration's class before `Config`, and its settings."""

    family: str
    settings: dict[str, Any]


def _of(family: str, **changes: Any) -> Foreign:
    return Foreign(family, {**_SHAPE, **changes})


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    # Heads of 8, so that scaling has frequencies of several lengths to tell apart.
    return {"head_dim": 8, "rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **settings}}


MODELS: dict[str, Foreign] = {
    "gpt2": Foreign("GPT2", _GPT2),
    "gpt2-untied-relu": Foreign(
        "GPT2", {**_GPT2, "tie_word_embeddings": False, "n_inner": 20, "activation_function": "relu"}
    ),
    "llama": _of("Llama"),
    "llama-biases-tied": _of("Llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, hidden_act="gelu"),
    "llama-linear": _of("Llama", **_rope("linear", factor=2.0)),
    "llama-llama3": _of(
        "Llama",
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama-yarn": _of("Llama", **_rope("yarn", factor=4.0, original_max_position_embeddings=8)),
    "mistral": _of("Mistral", **WINDOW),
    "qwen2": _of("Qwen2", tie_word_embeddings=True),
    "qwen2-windows": _of("Qwen2", **WINDOW, use_sliding_window=True, max_window_layers=1, num_hidden_layers=3),
    "qwen3": _of("Qwen3", head_dim=8),
    "mixtral": _of("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "gemma2": _of("Gemma2", **WINDOW, head_dim=8, query_pre_attn_scalar=12, num_hidden_layers=3),
    "phi3": _of("Phi3", **WINDOW, rope_parameters={"rope_theta": 1000.0, "partial_rotary_factor": 0.5}),
    "stablelm": _of("StableLm", use_qkv_bias=True, rope_parameters={"rope_theta": 100.0, "partial_rotary_factor": 0.5}),
    "starcoder2": _of("Starcoder2", **WINDOW),
}


def tokens() -> np.ndarray:
    """Two rows of ids, longer than any window."""
    return np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH), np.int32)


def build(foreign: Foreign) -> Any:
    """The model, float32; its matrices, gains and biases all matter."""
    import torch
    import transformers

    quiet()
    torch.manual_seed(0)
    config = getattr(transformers, f"{foreign.family}Config")(**foreign.settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def opened(folder: Path, dtype: str = "float32") -> Any:
    """The model in a folder, as transformers reads it."""
    import torch
    import transformers

    quiet()
    settings = {"attn_implementation": "eager", "dtype": getattr(torch, dtype)}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def logits(model: Any, ids: np.ndarray | None = None) -> np.ndarray:
    """Its logits as float32 [B, T, V]."""
    import torch

    with torch.no_grad():
        ids = tokens() if ids is None else ids
        return model(torch.tensor(ids, dtype=torch.long)).logits.float().numpy()


def quiet() -> None:
    """transformers without bars and notes, without a look at the network, and on one core: products are tiny."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
