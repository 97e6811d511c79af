"""A model that lies somewhere, whoever wrote it: what every format gives once it is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from polygpt.kernels import WeightType
from polygpt.model import ModelConfig, Params
from polygpt.tokenizers import Tokenizer


class ReadParams(Protocol):
    """Reads the weights of a model that was found."""

    def __call__(
        self, config: ModelConfig, on_progress: Callable[[int], None], weights: WeightType | None = None
    ) -> Params: ...


@dataclass(frozen=True)
class StoredModel:
    """A model that was found, its weights not yet read.

    Attributes:
        config: its configuration in our words.
        read: reads the weights for a configuration of the same shapes (another `param_dtype`, say, or a padded
            vocabulary); it is given a function that hears of progress, in weights, and the type in which to pack them
            for inference, or None.
        tokenizer: its tokenizer, if it has one.
        stop_tokens: ids that end a text, beside the tokenizer's own.
        chat_template: a Jinja template that lays out messages, if it has one.
        facts: what a reader may want to know of it: format, architecture, name.
    """

    config: ModelConfig
    read: ReadParams
    tokenizer: Tokenizer | None = None
    stop_tokens: tuple[int, ...] = ()
    chat_template: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
