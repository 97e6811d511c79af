"""A request: which tokens are continued, and how. Knows token ids; nothing of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal

from polygpt.errors import RequestError
from polygpt.generation.constraints import Constraint
from polygpt.generation.sampling import Sampler
from polygpt.model import ModelConfig

FinishReason = Literal["length", "stop", "context_length"]
# The likeliest tokens of which log probabilities are given at most.
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """One sequence to be continued.

    Attributes:
        prompt: its ids so far.
        max_new_tokens: how many are added at most.
        sampler: how each is chosen.
        seed: of its random numbers, 0 to 2^32 - 1. The key of a token is a function of the seed and of the token's
            position in the sequence alone, so a request's text does not depend on those it is decoded with.
        stop_tokens: ids that end it.
        logprobs: None for no log probabilities; otherwise those of the chosen tokens are given, and of this many of the
            likeliest.
        constraint: what the continuation must match.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None

    @property
    def stops(self) -> list[int]:
        """The stop tokens that can be sampled; no token has any other number."""
        return [token for token in self.stop_tokens if 0 <= token < 2**31]


def check_requests(config: ModelConfig, requests: Sequence[Request]) -> None:
    """Refuses requests that the model cannot continue.

    Raises:
        RequestError: a prompt is empty, longer than the context or not in the vocabulary, or a number is out of its
            range.
    """
    for request in requests:
        prompt, most = request.prompt, request.max_new_tokens
        if isinstance(most, bool) or not isinstance(most, Integral) or most < 1:
            raise RequestError(f"max_new_tokens must be a whole number of at least 1, not {most!r:.40}")
        if not isinstance(request.seed, Integral) or not 0 <= request.seed < 2**32:
            raise RequestError(f"seed must be a whole number in 0..{2**32 - 1}, not {request.seed!r:.40}")
        wanted = request.logprobs
        if wanted is not None and (
            isinstance(wanted, bool) or not isinstance(wanted, Integral) or not 0 <= wanted <= MOST_LOGPROBS
        ):
            raise RequestError(f"logprobs must be a whole number in 0..{MOST_LOGPROBS} or None, not {wanted!r:.40}")
        bias = next((token for token in request.sampler.logit_bias if not 0 <= token < config.vocab_size), None)
        if bias is not None:
            raise RequestError(f"logit_bias.{bias}: the model's ids are 0..{config.vocab_size - 1}")
        if not len(prompt):
            raise RequestError("the prompt is empty and the tokenizer has no end-of-text token to start from")
        if len(prompt) > config.context_length:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, model.context_length is {config.context_length}: shorten it"
            )
        bad = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if bad is not None:
            raise RequestError(f"token {bad} is outside the model's vocabulary of {config.vocab_size}")
