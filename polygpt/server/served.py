"""A model as the server knows it: its public name, its text, its limits, and the runner of its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Literal

from polygpt.errors import RequestError, TooLong
from polygpt.generation import Engine, Logprob, ScoredGeneration
from polygpt.inspection import score_tokens
from polygpt.language_model import LanguageModel
from polygpt.server.background import BackgroundWorker
from polygpt.server.errors import invalid, too_long
from polygpt.server.runner import Runner
from polygpt.server.schemas import MOST_LOGPROBS
from polygpt.server.settings import ServerSettings

# Characters of a text from which on its tokens are found in a thread.
_LONG = 2**13


class Served:
    """A language model under the one name by which clients know it.

    Attributes:
        name: the public name.
        lm: the model.
        runner: runs its jobs.
        background: computes what is no part of the engine.
        compiler: compiles constraints.
        length: tokens of a sequence at most, prompt included.
    """

    def __init__(
        self,
        name: str,
        lm: LanguageModel,
        settings: ServerSettings,
        draft: LanguageModel | Literal["lookup"] | None = None,
    ):
        """Makes the engine, which drafts tokens with `draft` (`LanguageModel.generate`).

        Raises:
            RequestError: the model has no tokenizer, or a setting or the draft does not fit it.
        """
        self.name, self.lm = name, lm
        tokenizer, speculation = lm.tokenizer, lm.speculation(draft)
        self.length = settings.length or min(lm.config.context_length, lm.model.longest_sequence)

        def make_engine() -> Engine:
            return Engine(
                lm.model,
                lm.params,
                slots=settings.slots,
                length=self.length,
                queue=settings.queue + settings.slots,
                cache_bytes=settings.cache_bytes,
                vocab_size=tokenizer.vocab_size,
                draft=speculation,
            )

        self.runner = Runner(make_engine, name, settings.slots, settings.queue)
        self.background = BackgroundWorker(name, settings.slots + settings.queue)
        self.compiler = BackgroundWorker(f"constraints of {name}", settings.slots + settings.queue)

    def close(self, seconds: float = 10.0) -> bool:
        """Ends the threads; returns whether they have ended within so many seconds."""
        return self.runner.close(seconds) & self.background.close(seconds) & self.compiler.close(seconds)

    def facts(self) -> dict[str, Any]:
        """What `/v1/settings` tells of it."""
        config = self.lm.config
        return {
            "name": self.name,
            "context_length": self.length,
            "vocab_size": self.lm.tokenizer.vocab_size,
            "num_layers": config.num_layers,
            "parameters": self.lm.num_parameters,
            "chat": self.lm.origin.chat_template is not None,
            "tools": self.knows_tools,
            "experts": self.has_experts,
        }

    async def score(self, tokens: list[int], top: int) -> list[Logprob | None]:
        """The log probability of each token after those before it, and of the `top` likeliest; None for the first."""
        scores = await self.background.run(score_tokens, self.lm.model, self.lm.params, tokens, MOST_LOGPROBS)
        own, ids = scores.logprobs.tolist(), scores.top_tokens[:, :top].tolist()
        best = [tuple(zip(*pair, strict=True)) for pair in zip(ids, scores.top_logprobs[:, :top].tolist(), strict=True)]
        return [None, *map(Logprob, own, best)]

    async def beams(self, tokens: list[int], beams: int, n: int, max_tokens: int) -> list[ScoredGeneration]:
        """The `n` likeliest continuations that `beams` beams find."""
        search = partial(self.lm.generate, tokens, beams=beams, n=n, max_new_tokens=max_tokens)
        return await self.background.run(search)

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template can offer tools."""
        return "tools" in (self.lm.origin.chat_template or "")

    @cached_property
    def has_experts(self) -> bool:
        """Whether some layer is a mixture of experts."""
        return any(hasattr(layer.feedforward, "num_experts") for layer in self.lm.config.layers)

    # --- Text and ids -------------------------------------------------------------------------------------------

    async def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of a prompt.

        Raises:
            ApiError: it is no text of this model's, or exceeds the context.
        """
        if isinstance(prompt, str):
            ids = await self.text_ids(prompt, most=self.length)
        else:
            ids = list(prompt)
            self.check_ids(ids, "prompt")
        if not ids:
            message = "the prompt is empty, and this model has no token to start a text from"
            raise invalid(message if isinstance(prompt, str) else "the prompt has no token ids", param="prompt")
        self._check_length(ids, "prompt")
        return ids

    async def text_ids(self, text: str, most: int | None = None) -> list[int]:
        """The ids of a prompt's text; one that must have more than `most` is refused before it is tokenized.

        Raises:
            ApiError: the tokenizer has no token for some of it, or it is too long.
        """
        try:
            if len(text) < _LONG:
                return self.lm.prompt_tokens(text, most=most)
            return await asyncio.to_thread(self.lm.prompt_tokens, text, most=most)
        except TooLong as error:
            raise too_long(error.tokens, self.length, "prompt", at_least=True) from None
        except RequestError as error:
            raise invalid(str(error), param="prompt") from None

    async def chat_ids(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), limited: bool = True
    ) -> list[int]:
        """The ids of a conversation, laid out by the chat template; `limited` to the context.

        Raises:
            ApiError: there is no template, it refuses the messages, or they exceed the context.
        """
        if self.lm.origin.chat_template is None:
            message = f"{self.name} came without a chat template, so it takes no messages: use /v1/completions"
            raise invalid(message, param="messages", code="no_chat_template")
        try:
            ids = await asyncio.to_thread(self.lm.chat_tokens, messages, tools, self.length if limited else None)
        except TooLong as error:
            raise too_long(error.tokens, self.length, "messages", at_least=True) from None
        except RequestError as error:
            raise invalid(str(error), param="messages") from None
        if limited:
            self._check_length(ids, "messages")
        return ids

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Refuses ids that are no tokens of the model's.

        Raises:
            ApiError: there is one.
        """
        size = self.lm.config.vocab_size
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            raise invalid(f"token {wrong} is outside the model's vocabulary of {size:,}", param=param)

    def _check_length(self, ids: Sequence[int], param: str) -> None:
        if len(ids) > self.length:
            raise too_long(len(ids), self.length, param)

    @cached_property
    def _vocabulary(self) -> list[bytes] | None:
        try:
            return self.lm.tokenizer.vocabulary_bytes()
        except RequestError:  # tokens of this kind have no bytes of their own
            return None

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        vocabulary = self._vocabulary
        if vocabulary is not None and token < len(vocabulary):
            return vocabulary[token] or self.lm.tokenizer.decode([token]).encode()
        return self.lm.tokenizer.decode([token]).encode()

    def token_text(self, token: int) -> str:
        """A token as log probabilities name it: its text, or `bytes:\\xe2\\x82` where it is a part of a character."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
