"""Zero biases, for architectures that have biases everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from polygpt.config import validate
from polygpt.model import ModelConfig, Params, model_of


def with_biases(config: ModelConfig) -> ModelConfig:
    """The configuration with every possible bias."""

    def biased(value: Any) -> Any:
        if isinstance(value, list):
            return [biased(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        return {key: True if key == "bias" else biased(entry) for key, entry in value.items()}

    return validate(ModelConfig, biased(config.to_dict()))


def with_zero_biases(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model with zeros for the biases it lacks."""
    full = with_biases(config)
    existing = flatten_dict(params)
    missing = {
        path: np.zeros(info.shape, info.dtype)
        for path, info in flatten_dict(model_of(full).parameters).items()
        if path not in existing
    }
    return full, unflatten_dict(existing | missing)
