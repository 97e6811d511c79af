"""A request: which tokens are continued, and how. Knows token ids; nothing of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from polygpt.errors import RequestError
from polygpt.generation.constraints import Constraint
from polygpt.generation.prompts import as_ids, as_whole
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

    def limit(self, longest: int) -> int:
        """The length, prompt included, at which the sequence ends if sequences may have `longest` tokens."""
        return min(len(self.prompt) + int(self.max_new_tokens), longest)


def check_requests(config: ModelConfig, requests: Sequence[Request]) -> None:
    """Refuses requests that the model cannot continue.

    Raises:
        RequestError: a prompt is empty, longer than the context or not in the vocabulary, a number is out of its range,
            or something is not of its type.
    """
    for request in requests:
        prompt = as_ids(request.prompt, "prompt")
        as_whole(request.max_new_tokens, "max_new_tokens", 1)
        as_whole(request.seed, "seed", 0, 2**32 - 1)
        as_ids(request.stop_tokens, "stop_tokens", least=None)  # those that no token has stop nothing
        if request.logprobs is not None:
            as_whole(request.logprobs, "logprobs", 0, MOST_LOGPROBS)
        if not isinstance(request.sampler, Sampler):
            raise RequestError(f"sampler must be a Sampler, not {request.sampler!r:.40}")
        if not isinstance(request.constraint, Constraint | None):
            raise RequestError(f"constraint must be a Constraint or None, not {request.constraint!r:.40}")
        bias = next((token for token in request.sampler.logit_bias if not 0 <= token < config.vocab_size), None)
        if bias is not None:
            raise RequestError(f"logit_bias.{bias}: the model's ids are 0..{config.vocab_size - 1}")
        if not len(prompt):
            raise RequestError("the prompt is empty and the tokenizer has no end-of-text token to start from")
        if len(prompt) > config.context_length:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, model.context_length is {config.context_length}: shorten it"
            )
        bad = next((token for token in prompt if token >= config.vocab_size), None)
        if bad is not None:
            raise RequestError(f"token {bad} is outside the model's vocabulary of {config.vocab_size}")
