"""Generation past the context length, by attention to a sliding window."""

from __future__ import annotations

from typing import Any

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.model import Model, ModelConfig, model_of


def windowed(config: ModelConfig) -> Model:
    """The model with every full attention limited to the last `context_length` - 1 positions.

    Its decoding states are of fixed size, so sequences may grow without end. Up to the window's length it computes what
    the model computes; from there on each token sees only the window, at distances that the model was trained on.

    Raises:
        RequestError: there are no positions past the context, or a part keeps a state that grows.
    """
    if not config.position.unbounded:
        raise RequestError(
            f"past_context: position {config.position.kind} has no positions past "
            f"context_length={config.context_length}"
        )
    window = config.context_length - 1
    fields = config.to_dict()
    for attention in (part.get("attention") for part in (fields, *fields["pattern"])):
        if attention is not None and "window" in attention and window > 0:
            attention["window"] = min(attention["window"] or window, window)
    model = model_of(validate(ModelConfig, fields))
    if model.longest_sequence <= config.context_length:
        growing = sorted({_growing(layer) for layer in model.config.layers})
        raise RequestError(f"past_context: {' and '.join(growing)} keeps a state that grows with the sequence")
    return model


def _growing(layer: Any) -> str:
    return f"attention {layer.attention.kind} or feedforward {layer.feedforward.kind}"
