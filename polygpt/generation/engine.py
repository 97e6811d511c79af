"""Generation: prompts are read in one pass, then continued token by token with a preallocated decoding state.

Knows token ids and a model; nothing of text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from polygpt.errors import PolygptError, RequestError
from polygpt.generation.constraints import Constraint
from polygpt.generation.programs import CHUNK, Progress, Settings, programs_of
from polygpt.generation.sampling import NOT_FINITE, Sampler, stack_samplers
from polygpt.model import Model, ModelConfig, Params

FinishReason = Literal["length", "stop", "context_length"]
# Stop tokens a row has room for; more double it, and each such width is compiled.
STOP_TOKENS = 8
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


class Piece(NamedTuple):
    """The new tokens of one row, and why it ended, if it did; the stop token that ends a row is left out."""

    tokens: list[int]
    finish_reason: FinishReason | None


class Chunk(NamedTuple):
    """A piece for each row, and the seconds that decoding them took; None for the first tokens, which prefill gives."""

    pieces: list[Piece]
    seconds: float | None


def generate_tokens(model: Model, params: Params, requests: Sequence[Request]) -> Iterator[Chunk]:
    """Continues the prompts of all requests together, a chunk of tokens at a time.

    Raises:
        RequestError: a prompt is empty or longer than the context, or a number is out of its range.
        PolygptError: logits are not finite numbers.
        ValueError: a request asks for penalties, a bias or log probabilities, which only `Engine` has.
    """
    check_requests(model.config, requests)
    if any(r.sampler.edits_logits or r.logprobs is not None or r.constraint is not None for r in requests):
        raise ValueError("penalties, logit_bias, logprobs and constraints need an Engine")
    longest = model.longest_sequence
    rows = [_Row(request, longest) for request in requests]
    if not any(row.budget for row in rows):
        yield Chunk([row.take([]) for row in rows], None)
        return
    programs, settings = programs_of(model.config), settings_of(requests, longest)
    progress = _prefill(model, params, requests, settings)
    yield Chunk([row.take([token]) for row, token in zip(rows, progress.token.tolist(), strict=True)], None)
    if all(row.ended for row in rows):
        return
    # Compiled before the clock starts; does nothing if it was compiled for these shapes before.
    programs.decode.lower(params, progress, settings).compile()
    while not all(row.ended for row in rows):
        started = time.perf_counter()
        progress, tokens = programs.decode(params, progress, settings)
        new = np.asarray(tokens).tolist()
        seconds = time.perf_counter() - started
        yield Chunk([row.take(tokens) for row, tokens in zip(rows, new, strict=True)], seconds)


class _Row:
    """What the host knows of one sequence: how many tokens may still come, and whether it has ended."""

    def __init__(self, request: Request, longest: int):
        self.request = request
        self.budget = _limit(request, longest) - len(request.prompt)
        self.taken, self.ended = 0, False

    def take(self, tokens: list[int]) -> Piece:
        """What belongs to the row of the tokens that were decoded for it."""
        if self.ended:
            return Piece([], None)
        tokens = tokens[: self.budget - self.taken]
        at = next((i for i, token in enumerate(tokens) if token in self.request.stops), None)
        if at is not None:
            self.ended = True
            return Piece(tokens[:at], "stop")
        if NOT_FINITE in tokens:
            raise PolygptError(
                "the model's logits are not finite numbers (NaN or infinity), so no token can be chosen: "
                "its weights are damaged, or its numbers exceed the range of compute_dtype"
            )
        self.taken += len(tokens)
        self.ended = self.taken == self.budget
        reason = "length" if self.budget == self.request.max_new_tokens else "context_length"
        return Piece(tokens, reason if self.ended else None)


def settings_of(requests: Sequence[Request], longest: int) -> Settings:
    """What the requests ask for, as arrays; sequences end at `longest` tokens."""
    width = _power_of_two(max(len(request.stops) for request in requests), STOP_TOKENS)
    stops = np.full((len(requests), width), NOT_FINITE)
    for row, request in zip(stops, requests, strict=True):
        row[: len(request.stops)] = request.stops
    return Settings(
        stack_samplers([request.sampler for request in requests]),
        np.array([request.seed for request in requests], np.uint32),
        np.array([_limit(request, longest) for request in requests], np.int32),
        stops.astype(np.int32),
    )


def _limit(request: Request, longest: int) -> int:
    return min(len(request.prompt) + request.max_new_tokens, longest)


def _prefill(model: Model, params: Params, requests: Sequence[Request], settings: Settings) -> Progress:
    context = model.config.context_length
    prompts = [request.prompt for request in requests]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), min(_power_of_two(int(lengths.max()), CHUNK), context)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    # Of new tokens the last one is never read.
    most = max(lengths.max(), settings.limit.max() - 1)
    state = model.init_state(len(prompts), _slots(int(most), model.longest_sequence))
    return programs_of(model.config).prefill(params, tokens, jnp.asarray(lengths), settings, state)


def _power_of_two(count: int, least: int) -> int:
    """`least` doubled until it holds `count`: few shapes, so few programs to compile."""
    while least < count:
        least *= 2
    return least


def _slots(length: int, context: int) -> int:
    """The slots of a decoding state that holds `length` tokens: rounded up to a quarter of a power of two, since each
    token attends over all slots, empty or not."""
    quarter = max(_power_of_two(length, CHUNK) // 8, CHUNK)
    return min(-(-length // quarter) * quarter, context)


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
