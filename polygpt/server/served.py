"""A model as the server knows it: its public name, its text, its limits, and the runner of its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from polygpt.errors import RequestError
from polygpt.generation import Engine, Logprob
from polygpt.language_model import LanguageModel
from polygpt.server.errors import invalid, too_long
from polygpt.server.runner import Runner
from polygpt.server.scoring import score_prompt
from polygpt.server.settings import ServerSettings


class Served:
    """A language model under the one name by which clients know it.

    Attributes:
        name: the public name.
        lm: the model.
        runner: runs its jobs.
        length: tokens of a sequence at most, prompt included.
        inspecting: held by the inspection that runs.
        inspections: how many run or wait.
    """

    def __init__(self, name: str, lm: LanguageModel, settings: ServerSettings):
        """Makes the engine.

        Raises:
            RequestError: the model has no tokenizer, or a setting does not fit it.
        """
        self.name, self.lm = name, lm
        tokenizer = lm.tokenizer
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
            )

        self.inspecting, self.inspections = asyncio.Semaphore(1), 0
        self.runner = Runner(make_engine, name, settings.slots, settings.queue)

    def facts(self) -> dict[str, Any]:
        """What `/v1/settings` tells of it."""
        config, template = self.lm.config, self.lm.origin.chat_template
        return {
            "name": self.name,
            "context_length": self.length,
            "vocab_size": self.lm.tokenizer.vocab_size,
            "num_layers": config.num_layers,
            "parameters": self.lm.num_parameters,
            "chat": template is not None,
            "tools": template is not None and "tools" in template,
            "experts": self.has_experts,
        }

    async def score(self, tokens: list[int], top: int) -> list[Logprob | None]:
        """The log probabilities of a prompt's tokens (`score_prompt`)."""
        return await asyncio.to_thread(score_prompt, self.lm, tokens, top)

    @cached_property
    def has_experts(self) -> bool:
        """Whether some layer is a mixture of experts."""
        return any(hasattr(layer.feedforward, "num_experts") for layer in self.lm.config.layers)

    # --- Text and ids -------------------------------------------------------------------------------------------

    def prompt_ids(self, prompt: str | Sequence[int], param: str = "prompt") -> list[int]:
        """The ids of a prompt.

        Raises:
            ApiError: it is no text of this model's, or exceeds the context.
        """
        if isinstance(prompt, str):
            try:
                ids = self.lm.prompt_tokens(prompt)
            except RequestError as error:
                raise invalid(str(error), param=param) from None
        else:
            ids = list(prompt)
            size = self.lm.config.vocab_size
            wrong = next((token for token in ids if not 0 <= token < size), None)
            if wrong is not None:
                raise invalid(f"token {wrong} is outside the model's vocabulary of {size:,}", param=param)
        if not ids:
            raise invalid("the prompt is empty, and this model has no token to start a text from", param=param)
        if len(ids) > self.length:
            raise too_long(len(ids), self.length, param)
        return ids

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
