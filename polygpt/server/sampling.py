"""From a request's fields to what the engine is asked for."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.generation import Constraint, Request, Sampler, TextStream, as_stop_strings
from polygpt.server.errors import invalid
from polygpt.server.jobs import Work
from polygpt.server.schemas import Sampled
from polygpt.server.served import Served
from polygpt.server.settings import ServerSettings

SAMPLER = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def sampler_of(body: Sampled, vocab_size: int) -> Sampler:
    """How tokens are chosen.

    Raises:
        ApiError: `logit_bias` names what is no token.
    """
    bias = {}
    for name, value in body.logit_bias.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10 and int(name) < vocab_size):
            message = f"logit_bias: {name!r:.40} is no token id; the model's are 0..{vocab_size - 1}"
            raise invalid(message, param="logit_bias")
        bias[int(name)] = value
    return validate(Sampler, {name: getattr(body, name) for name in SAMPLER} | {"logit_bias": bias})


def stops_of(body: Sampled, settings: ServerSettings) -> tuple[str, ...]:
    """The stop strings.

    Raises:
        ApiError: there are too many, or one is empty.
    """
    if len(body.stops) > settings.max_stops:
        raise invalid(f"stop: {len(body.stops)} strings; this server takes {settings.max_stops}", param="stop")
    try:
        return as_stop_strings(body.stops)
    except RequestError as error:
        raise invalid(str(error), param="stop") from None


def check_count(name: str, value: int | None, most: int) -> None:
    """Refuses a number above the server's limit.

    Raises:
        ApiError: it is.
    """
    if value is not None and value > most:
        raise invalid(f"{name}: {value:,} is above this server's limit of {most:,}", param=name)


async def constraint_of(served: Served, settings: ServerSettings, **given: Any) -> Constraint | None:
    """What the whole continuation must match: a `schema`, a `regex` or a `grammar`; None if none is given.

    Raises:
        ApiError: several are given, one cannot be used, or compiling it takes too long.
    """
    named = [name for name, value in given.items() if value is not None]
    if not named:
        return None
    param, seconds = {"schema": "response_format"}.get(named[0], named[0]), settings.constraint_seconds
    try:
        async with asyncio.timeout(seconds):
            return await served.compiler.run(partial(served.lm.constraint, **{name: given[name] for name in named}))
    except RequestError as error:
        raise invalid(str(error), param=param) from None
    except TimeoutError:
        message = f"{param} was not compiled within {seconds:g} seconds: make it smaller, or try again later"
        raise invalid(message, param=param, code="constraint_too_slow") from None


def works_of(
    served: Served,
    prompts: Sequence[Sequence[int]],
    body: Sampled,
    settings: ServerSettings,
    *,
    samples: int,
    max_tokens: int,
    logprobs: int | None,
    constraint: Constraint | None,
) -> list[Work]:
    """The sequences of a request: `samples` of each prompt, with seeds seed, seed + 1, ...

    Raises:
        ApiError: a field has a value that cannot be.
    """
    sampler, stops = sampler_of(body, served.lm.config.vocab_size), stops_of(body, settings)
    seed = secrets.randbits(32) if body.seed is None else body.seed
    tokenizer, ends = served.lm.tokenizer, served.lm.stop_tokens
    return [
        Work(
            Request(prompt, max_tokens, sampler, (seed + sample) % 2**32, ends, logprobs, constraint),
            TextStream(tokenizer.decode_after, prompt, stops),
        )
        for prompt in prompts
        for sample in range(samples)
    ]
