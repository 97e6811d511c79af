"""A model with its weights and tokenizer: what a user holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.generation import FinishReason, Sampler, generate_tokens
from polygpt.model import Model, ModelConfig, Params
from polygpt.tokenizers import Tokenizer


@dataclass(frozen=True)
class Generation:
    """What was generated: the continuation alone.

    Attributes:
        text: the new tokens as text.
        tokens: their ids.
        finish_reason: `length` (max_new_tokens reached), `stop` (end of text or a stop string), or
            `context_length` (the sequence fills the model's context).
        tokens_per_second: of decoding, the chunks left out in which programs are compiled, if there are others.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    tokens_per_second: float


class LanguageModel:
    """A decoder's weights with the tokenizer they were trained with (None for a model of random weights)."""

    def __init__(self, config: ModelConfig, params: Params, tokenizer: Tokenizer | None = None):
        self.config, self.params, self._tokenizer = config, params, tokenizer
        self.model = Model(config)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            RequestError: the model has none.
        """
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer: it was built from a preset; text needs a trained run")
        return self._tokenizer

    @property
    def num_parameters(self) -> int:
        return self.model.num_parameters

    @cached_property
    def _logits(self) -> Callable[[Params, Array], Array]:
        return jax.jit(self.model.logits)

    def logits(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """float32 logits of the token after each position.

        Raises:
            RequestError: tokens are not [B, T] integers inside the vocabulary, or T exceeds the context.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise RequestError(f"tokens must be integers [B, T], not {tokens.dtype}{list(tokens.shape)}")
        if tokens.shape[1] > self.config.context_length:
            raise RequestError(f"{tokens.shape[1]} tokens exceed the context_length of {self.config.context_length}")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.config.vocab_size):
            raise RequestError(f"token ids must lie in 0..{self.config.vocab_size - 1}")
        return self._logits(self.params, jnp.asarray(tokens, jnp.int32))

    def nll(self, text: str) -> Float[Array, "T-1"]:
        """Negative log likelihood, in nats, of each token of `text` after the first; float32 [T-1].

        Raises:
            RequestError: the text has more tokens than the context.
        """
        tokens = np.asarray(self.tokenizer.encode(text), np.int32)
        logits = self.logits(tokens[None])[0, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1)[:, 0]

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continues `prompt` until end of text, a `stop` string, `max_new_tokens`, or the end of the context.

        `temperature=0` is greedy. `on_text` is given each new piece of text as it is decoded.

        Raises:
            RequestError: the prompt is longer than the context, or a number is out of its range.
        """
        if not 0 <= seed < 2**32:
            raise RequestError(f"seed must lie in 0..{2**32 - 1}, not {seed}")
        if "" in stop:
            raise RequestError("a stop string is empty; leave it out")
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampler = validate(Sampler, settings)
        ids = self.tokenizer.encode(prompt)
        if not ids and self.tokenizer.end_of_text is not None:
            ids = [self.tokenizer.end_of_text]
        stop_token = self.tokenizer.end_of_text
        chunks = generate_tokens(
            self.model, self.params, [ids], sampler, max_new_tokens=max_new_tokens, seed=seed, stop_token=stop_token
        )
        return _collect((chunk[0] for chunk in chunks), self.tokenizer, tuple(stop), on_text)


def _collect(
    chunks: Iterator[tuple[list[int], FinishReason | None]],
    tokenizer: Tokenizer,
    stop: tuple[str, ...],
    on_text: Callable[[str], None] | None,
) -> Generation:
    """Joins a row's chunks, handing on text as soon as it can no longer change."""
    tokens: list[int] = []
    times = [(0, time.perf_counter())]  # tokens and clock after each chunk
    shown = ""
    held = max((len(word) for word in stop), default=1) - 1  # a stop string may be cut by the end of a chunk
    for new, reason in chunks:
        tokens += new
        times.append((len(tokens), time.perf_counter()))
        text = tokenizer.decode(tokens)
        cut = min((at for word in stop if (at := text.find(word)) >= 0), default=None)
        if cut is not None:
            text, reason = text[:cut], "stop"
        # A character may be cut, too: an unfinished one decodes to U+FFFD until its last byte has come.
        safe = text if reason else text[: max(len(text) - held, 0)].rstrip("\ufffd")
        if on_text is not None and len(safe) > len(shown):
            on_text(safe[len(shown) :])
            shown = safe
        if reason:
            return Generation(text, tokens, reason, _speed(times))
    raise AssertionError("generation ended without a reason")


def _speed(times: list[tuple[int, float]]) -> float:
    """Tokens a second from the third chunk on: the first two (prefill, the first decoding) may have been compiled."""
    (before, start), (after, end) = times[2] if len(times) > 3 else times[0], times[-1]
    return (after - before) / (end - start)
