"""Presets: functions that return the fields of a model, each written as its difference from another.

`PRESETS` is the registry; `preset(name, **overrides)` gives the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polygpt.config import dotted_to_nested, merge, validate
from polygpt.errors import RequestError, suggest
from polygpt.presets import core, experts, gpt2, names, small

if TYPE_CHECKING:
    from polygpt.model import ModelConfig

Fields = dict[str, Any]
models_in = names.models_in

# The size that stands for an open vocabulary where there is no tokenizer: GPT-2's.
PRESET_VOCAB = 50257
PRESETS: dict[str, Callable[[], Fields]] = {
    "gpt": core.gpt,
    "vgpt": core.vgpt,
    "nope_gpt": core.nope_gpt,
    "glu_gpt": core.glu_gpt,
    "rope_gpt": core.rope_gpt,
    "glu_rope_gpt": core.glu_rope_gpt,
    "gqa_gpt": core.gqa_gpt,
    "gqa_glu_rope_gpt": core.gqa_glu_rope_gpt,
    "tiny_moe": experts.tiny_moe,
    "tiny_moe_2": experts.tiny_moe_2,
    "tiny_moe_3": experts.tiny_moe_3,
    "smollm": core.smollm,
    "charformer": small.charformer,
    "giant": small.giant,
    "modular": small.modular,
    "small": small.small,
    "tiny_large": small.tiny_large,
    "gpt2": gpt2.gpt2,
    "gpt2_medium": gpt2.gpt2_medium,
    "gpt2_large": gpt2.gpt2_large,
    "gpt2_xl": gpt2.gpt2_xl,
    "bigram": small.bigram,
}


def check_model_name(name: str) -> None:
    """Refuses a MODEL that is no file or folder, no preset, and not of the Hugging Face Hub.

    Raises:
        RequestError: names the nearest preset or model in the same folder.
    """
    names.check_model_name(name, PRESETS)


def preset_fields(name: str) -> Fields:
    """The plain fields of a preset, ready for overrides.

    Raises:
        RequestError: there is no such preset; the nearest is named.
    """
    if name not in PRESETS:
        raise RequestError(f"no preset '{name}'; {suggest(name, PRESETS)}")
    return PRESETS[name]()


def preset(name: str, **overrides: Any) -> ModelConfig:
    """A preset's configuration with fields overridden: `preset("gpt", num_layers=4)`.

    A nested field is reached by a mapping (`attention={"num_heads": 4}`) or a dotted key.

    Raises:
        RequestError: no such preset or key, or the result does not fit together.
    """
    from polygpt.model import ModelConfig  # imports JAX, which the names of presets do without

    return validate(ModelConfig, merge(preset_fields(name), dotted_to_nested(overrides)), name)


__all__ = ["PRESETS", "PRESET_VOCAB", "check_model_name", "models_in", "preset", "preset_fields"]
