"""Settings of config.json that several Hugging Face architectures share and that are more than one number each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from polygpt.interop.architecture import Fields, flag
from polygpt.settings import Settings

# transformers' name -> ours. Names that share one of ours are the same function.
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
TIED = flag("tie_word_embeddings", "head", true="tied", false="untied")
QUERY_KEY_VALUE = tuple(f"blocks.attention.{part}" for part in ("query", "key", "value"))


@dataclass(frozen=True)
class Activation:
    """The feed-forward's activation: the setting's name, and its value where absent."""

    name: str
    default: str

    def read(self, settings: Settings, fields: Fields) -> None:
        theirs = settings.get(self.name, self.default)
        if not isinstance(theirs, str) or theirs not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise settings.error(f"'{self.name}' is {theirs!r}, an unknown activation; known: {known}")
        fields["feedforward.activation"] = ACTIVATIONS[theirs]

    def write(self, fields: Fields) -> dict[str, Any]:
        ours = fields.get("feedforward.activation")
        names = [theirs for theirs in (self.default, *ACTIVATIONS) if ACTIVATIONS[theirs] == ours]
        return {self.name: names[0]} if names else {}


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `rope_parameters` or, in older files, three settings.

    Attributes:
        partial: a fraction of each head can be rotated; other architectures rotate all of it, whatever the file says.
        scalable: the angles can be scaled.
    """

    partial: bool = False
    scalable: bool = True

    def read(self, settings: Settings, fields: Fields) -> None:
        theta = settings.take("rope_theta", float, 10000.0)
        fraction = settings.take("partial_rotary_factor", float, 1.0)
        newer, older = settings.part("rope_parameters"), settings.part("rope_scaling")
        # Of two, transformers (`convert_rope_params_to_dict`) reads the older one alone, unless it is empty.
        scaling = older if older is not None and older.values else newer
        if scaling is not None:
            theta = scaling.take("rope_theta", float, theta)
            fraction = scaling.take("partial_rotary_factor", float, fraction)
            kind = scaling.get("rope_type") or scaling.get("type") or "default"
            scaling.ignore("rope_type", "type", "attn_factor", "finetuned")  # the last two are llama.cpp's and YaRN's
            if kind != "default":
                if not self.scalable:
                    raise scaling.error(
                        f"'rope_type' is {kind!r}; only unscaled angles are known for this architecture"
                    )
                fields["position.scaling"] = _read_scaling(kind, scaling, settings)
            scaling.finish()
        if not self.partial and fraction != 1:
            raise settings.error(
                "'partial_rotary_factor' has no effect in this architecture, which rotates whole heads"
            )
        fields |= {"position.kind": "rope", "position.theta": theta, "position.fraction": fraction}

    def write(self, fields: Fields) -> dict[str, Any]:
        """The form that older and newer versions of transformers both read."""
        if fields["position.kind"] != "rope":
            return {}
        settings = {"rope_theta": fields["position.theta"], "rope_scaling": None}
        if self.partial:
            settings["partial_rotary_factor"] = fields["position.fraction"]
        scaling = dict(fields["position.scaling"] or {"kind": "ntk"})
        if scaling["kind"] != "ntk":
            if "original_context_length" in scaling:
                scaling["original_max_position_embeddings"] = scaling.pop("original_context_length")
            scaling["rope_type"] = scaling.pop("kind")
            settings["rope_scaling"] = {name: value for name, value in scaling.items() if value is not None}
        return settings


def _read_scaling(kind: str, scaling: Settings, settings: Settings) -> dict[str, Any]:
    if kind not in ("linear", "yarn", "llama3"):
        raise scaling.error(f"'rope_type' is {kind!r}, an unknown scaling; known: linear, llama3, yarn")
    fields = {"kind": kind, "factor": scaling.take("factor", float)}
    if kind == "linear":
        scaling.ignore("original_max_position_embeddings")
        return fields
    trained = settings.get("max_position_embeddings")
    fields["original_context_length"] = scaling.take("original_max_position_embeddings", int, trained)
    if kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
        return fields | {name: scaling.take(name, float) for name in names}
    scaling.require("truncate", True, "only a ramp between whole indices is known")
    own = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": _attention_factor(fields["factor"], scaling)}
    return fields | {name: scaling.take(name, float, default) for name, default in own.items()}


def _attention_factor(factor: float, scaling: Settings) -> float | None:
    """What DeepSeek's two settings say of yarn's magnitude; None: the paper's own rule."""
    scales = [scaling.take(name, float, None) for name in ("mscale", "mscale_all_dim")]
    if not all(scales):
        return None
    numerator, denominator = (0.1 * scale * math.log(max(factor, 1.0)) + 1.0 for scale in scales)
    return numerator / denominator


@dataclass(frozen=True)
class LayerWindows:
    """`layer_types`: which layers have the sliding window.

    Attributes:
        switched: the window counts only with `use_sliding_window`, by default in the layers from `max_window_layers` on
            (Qwen); otherwise by default in every second layer, from the first (Gemma 2).
    """

    switched: bool

    def read(self, settings: Settings, fields: Fields) -> None:
        window, layers = settings.take("sliding_window", int, None), fields["num_layers"]
        windowed = [i % 2 == 0 for i in range(layers)]
        if self.switched:
            used = settings.take("use_sliding_window", bool, False)
            first, window = settings.take("max_window_layers", int), window if used else None
            windowed = [used and i >= first for i in range(layers)]
        known = {"full_attention": None, "sliding_attention": window}
        types = settings.get("layer_types") or [[*known][w] for w in windowed]
        if not isinstance(types, list) or len(types) != layers or not all(name in [*known] for name in types):
            raise settings.error(
                f"'layer_types' must name full_attention or sliding_attention for each of {layers} layers"
            )
        windows = [known[name] for name in types]
        if any(windows):
            # The shortest pattern that repeats.
            period = next(n for n in range(1, layers + 1) if all(windows[i] == windows[i % n] for i in range(layers)))
            fields["pattern"] = [{"attention": {"window": window}} for window in windows[:period]]

    def write(self, fields: Fields) -> dict[str, Any]:
        windows = fields["windows"]
        window = next((window for window in windows if window is not None), None)
        types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        switch = {"use_sliding_window": window is not None, "max_window_layers": 0} if self.switched else {}
        return {"layer_types": types, "sliding_window": window, **switch}
