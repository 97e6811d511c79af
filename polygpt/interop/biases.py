"""A model as an architecture sees it that has biases everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from polygpt.config import validate
from polygpt.model import Model, ModelConfig, Params


def with_biases(config: ModelConfig) -> ModelConfig:
    """The configuration with a bias wherever there may be one."""

    def biased(value: Any) -> Any:
        if isinstance(value, list):
            return [biased(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        return {key: True if key == "bias" else biased(entry) for key, entry in value.items()}

    return validate(ModelConfig, biased(config.to_dict()))


def with_zero_biases(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model with zeros for the biases that it has not."""
    full = with_biases(config)
    held = flatten_dict(params)
    missing = {
        path: np.zeros(info.shape, info.dtype)
        for path, info in flatten_dict(Model(full).parameters).items()
        if path not in held
    }
    return full, unflatten_dict(held | missing)
