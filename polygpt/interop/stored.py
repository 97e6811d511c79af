"""A model in storage, whatever its format: what opening it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxtyping import PyTree

from polygpt.kernels import WeightType
from polygpt.model import ModelConfig, Params
from polygpt.tokenizers import Tokenizer


class ReadParams(Protocol):
    """Reads the weights of a stored model."""

    def __call__(
        self,
        config: ModelConfig,
        on_progress: Callable[[int], None],
        weights: WeightType | None = None,
        shardings: PyTree | None = None,
    ) -> Params: ...


@dataclass(frozen=True)
class StoredModel:
    """A model that was found and checked; its weights have not been read yet.

    Attributes:
        config: its configuration.
        read: reads the weights for a configuration of the same shapes (with another `param_dtype`, say, or a padded
            vocabulary). It takes a progress callback, which is given the number of weights read, the type in which to
            pack them for inference, or None, and where each goes, if not to the first device.
        tokenizer: its tokenizer, if it has one.
        stop_tokens: ids that end a text, besides the tokenizer's own.
        chat_template: a Jinja template that lays out messages, if it has one.
        facts: what a reader may want to know: format, architecture, name.
    """

    config: ModelConfig
    read: ReadParams
    tokenizer: Tokenizer | None = None
    stop_tokens: tuple[int, ...] = ()
    chat_template: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
