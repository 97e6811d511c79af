"""What a model is and costs, as plain data for tables and JSON; computed from shapes, nothing allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from polygpt.config import dotted_to_nested, merge, read_yaml, validate
from polygpt.errors import RequestError, suggest
from polygpt.model import Model, ModelConfig
from polygpt.presets import PRESETS, preset
from polygpt.recipes import load_recipe, model_fields, recipe_names
from polygpt.training import read_config

# What an open vocabulary is counted with where no tokenizer is at hand: GPT-2's.
PRESET_VOCAB = 50257


def resolve_model(name: str, overrides: Mapping[str, Any] | None = None) -> tuple[ModelConfig, bool]:
    """The model that a preset, a recipe, a YAML file (of a model or a run) or a run's folder names.

    Overrides are written as in a run (`model.num_layers=4`). Also says whether the vocabulary was open, and so is
    `PRESET_VOCAB`.

    Raises:
        RequestError: there is nothing by that name, or an override is wrong.
    """
    changes = dotted_to_nested(overrides or {})
    for key in changes:
        if key != "model":
            raise RequestError(f"{key}: only the model is shown; write model.KEY=VALUE")
    config = validate(ModelConfig, merge(_fields(name), changes.get("model", {})), name)
    return config.with_vocab(PRESET_VOCAB), config.vocab_size is None


def _fields(name: str) -> dict[str, Any]:
    if name in PRESETS:
        return preset(name).to_dict()
    path = Path(name).expanduser()
    if path.is_dir():
        return read_config(path).model.to_dict()
    if path.suffix in (".yaml", ".yml"):
        fields = read_yaml(path)
        model = fields.get("model", fields)
        if not isinstance(model, Mapping):
            raise RequestError(f"{path}: model: a mapping is needed, not {model!r}")
        return model_fields(model)
    if name in recipe_names():
        return load_recipe(name).model.to_dict()
    known = [*PRESETS, *recipe_names()]
    raise RequestError(f"no preset, recipe, run or .yaml file '{name}'; {suggest(name, known)}")


def summary(config: ModelConfig) -> dict[str, Any]:
    """The resolved configuration with its parameters, active parameters, KV bytes a token and FLOPs a token."""
    model = Model(config)
    return {
        "config": config.to_dict(),
        "parameters": model.num_parameters,
        "active_parameters": model.num_active_parameters,
        "kv_cache_bytes_per_token": model.state_bytes_per_token,
        "flops_per_token": model.flops_per_token,
    }


def preset_summaries() -> list[dict[str, Any]]:
    """A summary for every preset, an open vocabulary counted as `PRESET_VOCAB`."""
    rows = []
    for name in PRESETS:
        config, is_open = resolve_model(name)
        rows.append({"preset": name, "open_vocabulary": is_open, "width": config.width, **summary(config)})
    return rows


def parameter_table(config: ModelConfig) -> list[tuple[str, str, str, int]]:
    """(name, shape, logical axes, count) of every parameter."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(Model(config).parameters)
    return [
        (
            jax.tree_util.keystr(path, simple=True, separator="."),
            " × ".join(map(str, info.shape)) or "scalar",
            ", ".join(info.axes),
            info.size,
        )
        for path, info in leaves
    ]
