"""polygpt: one decoder, every GPT.

    config = polygpt.preset("gqa_glu_rope_gpt", num_layers=4)
    lm = polygpt.build(config, seed=0)
    lm = polygpt.load("runs/demo")
    lm.generate("Once upon a time", max_new_tokens=64, temperature=0.8, seed=1).text

Names are imported when they are first used, so that `polygpt --help` need not load JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polygpt.errors import PolygptError, RequestError
    from polygpt.language_model import Generation, LanguageModel
    from polygpt.loading import build, load
    from polygpt.model import ModelConfig
    from polygpt.presets import preset
    from polygpt.recipes import load_recipe
    from polygpt.training import RunConfig, train

_HOMES = {
    "Generation": "language_model",
    "LanguageModel": "language_model",
    "ModelConfig": "model",
    "PolygptError": "errors",
    "RequestError": "errors",
    "RunConfig": "training",
    "build": "loading",
    "load": "loading",
    "load_recipe": "recipes",
    "preset": "presets",
    "train": "training",
}

__all__ = [
    "Generation",
    "LanguageModel",
    "ModelConfig",
    "PolygptError",
    "RequestError",
    "RunConfig",
    "build",
    "load",
    "load_recipe",
    "preset",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("polygpt")
    if name not in _HOMES:
        raise AttributeError(f"module 'polygpt' has no attribute '{name}'")
    return getattr(importlib.import_module(f"polygpt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
