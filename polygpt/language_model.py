"""A model with its weights and tokenizer: what a user holds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.generation import FinishReason, Sampler, generate_tokens
from polygpt.kernels import WEIGHT_TYPES, WeightType
from polygpt.model import Model, ModelConfig, Params
from polygpt.tokenizers import Tokenizer, chat_tokens

NO_TOKENIZER = "this model has no tokenizer: a preset has none, nor has a folder without tokenizer.json"


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


@dataclass(frozen=True)
class Origin:
    """What came with a model that was made elsewhere.

    Attributes:
        stop_tokens: ids at which generation ends, beside the tokenizer's own.
        chat_template: Jinja, for `LanguageModel.chat_prompt`.
        facts: format, architecture, name.
    """

    stop_tokens: tuple[int, ...] = ()
    chat_template: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> Origin:
        """What `to_json` wrote, parsed.

        Raises:
            RequestError: it is something else; `where` is named.
        """
        try:
            origin = cls(tuple(map(int, values["stop_tokens"])), values["chat_template"], dict(values["facts"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"{where}: not what an import writes ({type(error).__name__}: {error})") from None
        return origin


class LanguageModel:
    """A decoder's weights with the tokenizer they were trained with (None for a model of random weights)."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        origin: Origin | None = None,
        packed: WeightType | None = None,
    ):
        """`packed`: the type in which `params` are packed already (`Model.pack`)."""
        self.config, self.params, self._tokenizer = config, params, tokenizer
        self.origin = origin or Origin()
        self.model = Model(config)
        self.packed = packed

    def pack(self, dtype: WeightType) -> None:
        """Keeps the weights from now on in the form that inference reads fastest, in this type.

        Decoding a few rows takes as long as the weights take to read: 16 bits are twice as fast as 32. int8 rounds each
        weight to one of 255 steps, chosen for each output; activations stay as they are. Cannot be undone.

        Raises:
            RequestError: they are packed already, or there is no such type.
        """
        self.check_unpacked()
        if dtype not in WEIGHT_TYPES:
            raise RequestError(f"no weights of type '{dtype}'; there are {', '.join(WEIGHT_TYPES)}")
        self.params, self.packed = self.model.pack(self.params, dtype), dtype

    def check_unpacked(self) -> None:
        """Refuses where the parameters themselves are needed.

        Raises:
            RequestError: the weights are packed.
        """
        if self.packed is not None:
            raise RequestError(f"the weights are packed (as {self.packed}): load the model without that")

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            RequestError: the model has none.
        """
        if self._tokenizer is None:
            raise RequestError(NO_TOKENIZER)
        return self._tokenizer

    @property
    def num_parameters(self) -> int:
        return self.model.num_parameters

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters without the tables of tokens and positions."""
        return self.model.num_non_embedding_parameters

    @property
    def training_bytes(self) -> dict[str, int]:
        """Bytes of `parameters`, `gradients` and `optimizer_state` (Adam's two moments) in training."""
        return self.model.training_bytes()

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

        Where the tokenizer puts a start token before a text, the model sees it.

        Raises:
            RequestError: the text has more tokens than the context.
        """
        start = len(self.tokenizer.start)
        tokens = np.asarray([*self.tokenizer.start, *self.tokenizer.encode(text)], np.int32)
        logits, tokens = self.logits(tokens[None])[0, start:-1], tokens[start:]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1)[:, 0]

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a text."""
        end = self.tokenizer.end_of_text
        return tuple(dict.fromkeys([*self.origin.stop_tokens, *([] if end is None else [end])]))

    def prompt_tokens(self, prompt: str, chat: bool = False) -> list[int]:
        """The ids from which a prompt is continued: a start token, if the tokenizer has one, and the text's.

        Special tokens typed in a prompt are ordinary text. With `chat` the prompt is a user's message within the chat
        template, whose own special tokens count.

        Raises:
            RequestError: `chat` is asked for and there is no template.
        """
        tokenizer = self.tokenizer
        if chat:
            return self._chat_tokens(prompt)
        ids = [*tokenizer.start, *tokenizer.encode(prompt)]
        return ids or ([] if tokenizer.end_of_text is None else [tokenizer.end_of_text])

    def _chat_tokens(self, prompt: str) -> list[int]:
        template = self.origin.chat_template
        if template is None:
            raise RequestError("this model came without a chat template; leave chat out and write the prompt in full")
        return chat_tokens(self.tokenizer, template, prompt)

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
        chat: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continues `prompt` until end of text, a `stop` string, `max_new_tokens`, or the end of the context.

        `temperature=0` is greedy. With `chat` the prompt is a user's message, laid out as the model's chat template
        says. `on_text` is given each new piece of text as it is decoded.

        Raises:
            RequestError: the prompt is longer than the context, a number is out of its range, or there is no chat
                template.
        """
        if not 0 <= seed < 2**32:
            raise RequestError(f"seed must lie in 0..{2**32 - 1}, not {seed}")
        if "" in stop:
            raise RequestError("a stop string is empty; leave it out")
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampler = validate(Sampler, settings)
        ids = self.prompt_tokens(prompt, chat)
        chunks = generate_tokens(
            self.model,
            self.params,
            [ids],
            sampler,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop_tokens=self.stop_tokens,
        )
        return _collect((chunk[0] for chunk in chunks), self._continuation(ids), tuple(stop), on_text)

    def _continuation(self, prompt: list[int]) -> Callable[[list[int]], str]:
        """The text of ids that follow `prompt`: some tokenizers drop the space before the first word they decode."""
        decode = self.tokenizer.decode
        before = decode(prompt[-4:])

        def text(tokens: list[int]) -> str:
            whole = decode([*prompt[-4:], *tokens])
            return whole[len(before) :] if whole.startswith(before) else decode(tokens)

        return text


def _collect(
    chunks: Iterator[tuple[list[int], FinishReason | None]],
    decode: Callable[[list[int]], str],
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
        text = decode(tokens)
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
