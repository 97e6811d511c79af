"""Which model a name stands for, and what it costs, as plain data for tables and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polygpt.config import dotted_to_nested, merge, read_yaml, validate
from polygpt.errors import RequestError, suggest
from polygpt.interop import HUB
from polygpt.loading import CONFIG as RUN
from polygpt.loading import find
from polygpt.model import Model, ModelConfig
from polygpt.presets import PRESET_VOCAB, PRESETS, preset
from polygpt.recipes import load_recipe, model_fields, recipe_names


def resolve_model(name: str, overrides: Mapping[str, Any] | None = None) -> tuple[ModelConfig, bool]:
    """The model that a preset, a recipe, a YAML file (of a model or a run), or any MODEL names.

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
    if (path / RUN).is_file():  # a run need not have come to a checkpoint
        return dict(read_yaml(path / RUN).get("model") or {})
    if path.suffix in (".yaml", ".yml"):
        fields = read_yaml(path)
        model = fields.get("model", fields)
        if not isinstance(model, Mapping):
            raise RequestError(f"{path}: model: a mapping is needed, not {model!r}")
        return model_fields(model)
    if name in recipe_names():
        return load_recipe(name).model.to_dict()
    if path.exists() or name.startswith(HUB):
        return find(name).config.to_dict()
    known = [*PRESETS, *recipe_names()]
    raise RequestError(f"no preset, recipe, model or .yaml file '{name}'; {suggest(name, known)}")


def summary(config: ModelConfig) -> dict[str, Any]:
    """The resolved configuration and what it costs.

    Bytes are of one sequence's decoding state, FLOPs of training on a token at full context.
    `attention_implementation` is None where the one that was asked for cannot run on this machine; `notes` says so,
    and what else is to be known before training.
    """
    model = Model(config)
    implementation, refusal = None, None
    try:
        implementation = model.attention_implementation()
    except RequestError as error:
        refusal = f"cannot run on this machine: {error}"
    return {
        "config": config.to_dict(),
        "parameters": model.num_parameters,
        "active_parameters": model.num_active_parameters,
        "kv_cache_bytes_per_token": model.state_bytes_per_token,
        "state_bytes_at_full_context": model.state_bytes(config.context_length),
        "flops_per_token": model.flops_per_token,
        "attention_implementation": implementation,
        "causal_in_training": model.training_caveat is None,
        "notes": [note for note in (model.training_caveat, refusal) if note],
    }


def preset_summaries() -> list[dict[str, Any]]:
    """A summary for every preset, an open vocabulary counted as `PRESET_VOCAB`."""
    rows = []
    for name in PRESETS:
        config, is_open = resolve_model(name)
        rows.append({"preset": name, "open_vocabulary": is_open, "width": config.width, **summary(config)})
    return rows
