"""What a Hugging Face architecture is to us: a table of names, and its configuration read into ours and back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polygpt.interop.names import Layout, NameTable
from polygpt.interop.settings import Settings
from polygpt.model import ModelConfig

# transformers' name -> ours. What several names share is the same function.
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}
# What says nothing of the logits: bookkeeping, generation, training, how transformers runs it.
WITHOUT_EFFECT = (
    # What the model is called, and tasks it is not opened for.
    *("architectures", "model_type", "auto_map", "transformers_version", "transformers.js_config"),
    *("tokenizer_class", "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "polygpt"),
    # How generation was set up, before it had a file of its own.
    *("do_sample", "early_stopping", "temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups"),
    *("max_length", "min_length", "length_penalty", "repetition_penalty", "diversity_penalty", "num_return_sequences"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "prefix"),
    *("begin_suppress_tokens", "exponential_decay_length_penalty", "remove_invalid_values"),
    # What a call returns and how it is run.
    *("output_attentions", "output_hidden_states", "output_scores", "output_router_logits", "return_dict"),
    *("return_dict_in_generate", "keys_to_ignore_at_inference", "use_cache", "use_bfloat16", "torchscript", "dtype"),
    *("torch_dtype", "chunk_size_feed_forward", "gradient_checkpointing", "pretraining_tp", "tf_legacy_loss"),
    *("cross_attention_hidden_size", "is_decoder", "is_encoder_decoder"),
    # Drawing new weights, and the mark of a tool that turned other layouts into this one.
    *("initializer_range", "is_llama_config", "rope_interleaved"),
)
# Ids of special tokens (the tokenizer and generation have their own), and what a tool notes for itself.
NOTES = re.compile(r".*_token_ids?|_.*")


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's.

    Attributes:
        name: its class, as `architectures` in config.json names it.
        model_type: as `model_type` names it.
        names: foreign tensor -> our parameters.
        prefix: what the names begin with; files of the bare model leave it out.
        read: config.json -> the fields of a `ModelConfig`.
        write: a `ModelConfig` -> config.json, as nearly as this architecture can say it.
        defaults: what its class takes where config.json leaves a key out (null is not left out).
        layout: how tensors are stored.
        ignored: a pattern of tensors that hold no weights.
        zero_biases: it has biases everywhere; a model without some is written with zeros in their place.
    """

    name: str
    model_type: str
    names: NameTable
    prefix: str
    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = field(default_factory=Layout)
    ignored: str = r"(?!)"
    zero_biases: bool = False


def activation(settings: Settings, *names: str, default: str) -> str:
    """Our name of the activation that the first of the settings `names` gives."""
    name = next((settings.get(key) for key in names if settings.get(key) is not None), default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise settings.error(f"'{names[0]}' is {name!r}, an activation that is not known; known: {known}")
    return ACTIVATIONS[name]


def foreign_activation(ours: str) -> str:
    """transformers' name of an activation of ours."""
    preferred = {"gelu": "gelu_new", "silu": "silu"}
    return preferred.get(ours) or next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def read_rope(settings: Settings, partial: bool = False) -> dict[str, Any]:
    """The fields of our rotary position, from `rope_parameters` or, as older files have it, from three settings.

    `partial`: in this architecture a share of each head may turn; in others all of it, whatever is said.
    """
    theta = settings.take("rope_theta", float, 10000.0)
    fraction = settings.take("partial_rotary_factor", float, 1.0)
    scaling = settings.part("rope_parameters") or settings.part("rope_scaling")
    settings.ignore("rope_parameters", "rope_scaling")
    fields = {"kind": "rope", "theta": theta, "fraction": fraction}
    if scaling is not None:
        fields["theta"] = scaling.take("rope_theta", float, theta)
        fields["fraction"] = scaling.take("partial_rotary_factor", float, fraction)
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        scaling.ignore("rope_type", "type")
        if kind != "default":
            fields["scaling"] = _read_scaling(kind, scaling, settings)
        scaling.finish()
    if not partial and fields["fraction"] != 1:
        raise settings.error("'partial_rotary_factor' has no effect in this architecture, whose heads turn whole")
    return fields


def _read_scaling(kind: str, scaling: Settings, settings: Settings) -> dict[str, Any]:
    if kind not in ("linear", "yarn", "llama3"):
        raise scaling.error(f"'rope_type' is {kind!r}, a scaling that is not known; known: linear, llama3, yarn")
    fields = {"kind": kind, "factor": scaling.take("factor", float)}
    if kind == "linear":
        return fields
    trained = settings.get("max_position_embeddings")
    fields["original_context_length"] = scaling.take("original_max_position_embeddings", int, trained)
    if kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
        return fields | {name: scaling.take(name, float) for name in names}
    scaling.require("truncate", True, "only the ramp between whole indices is known")
    own = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": _attention_factor(fields["factor"], scaling)}
    return fields | {name: scaling.take(name, float, default) for name, default in own.items()}


def _attention_factor(factor: float, scaling: Settings) -> float | None:
    """What DeepSeek's two settings say of yarn's magnitude; None: the paper's own rule."""
    scales = [scaling.take(name, float, None) for name in ("mscale", "mscale_all_dim")]
    if not all(scales):
        return None
    above, below = (0.1 * scale * math.log(max(factor, 1.0)) + 1.0 for scale in scales)
    return above / below


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """The settings of our rotary position, in the form that older and newer transformers both read."""
    position = model.position
    if position.kind != "rope":
        return {}
    settings: dict[str, Any] = {"rope_theta": position.theta, "rope_scaling": None}
    if position.fraction != 1:
        settings["partial_rotary_factor"] = position.fraction
    if position.scaling is not None and position.scaling.kind != "ntk":
        values = position.scaling.to_dict()
        if "original_context_length" in values:
            values["original_max_position_embeddings"] = values.pop("original_context_length")
        values["rope_type"] = values.pop("kind")
        settings["rope_scaling"] = {name: value for name, value in values.items() if value is not None}
    return settings


def shared_fields(settings: Settings) -> dict[str, Any]:
    """What config.json says alike for every architecture."""
    return {
        "vocab_size": settings.take("vocab_size", int),
        "head": "tied" if settings.take("tie_word_embeddings", bool, False) else "untied",
    }


def shared_settings(model: ModelConfig) -> Mapping[str, Any]:
    """The inverse of `shared_fields`."""
    return {"vocab_size": model.vocab_size - model.vocab_padding, "tie_word_embeddings": model.head == "tied"}
