"""Decoding under a constraint: the host hands a mask of allowed tokens to every step.

Tokens that are the only ones allowed are appended without being sampled, and read together with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from polygpt.errors import PolygptError
from polygpt.generation.constraints import Matcher, Vocabulary
from polygpt.generation.continuation import Continuation, feed
from polygpt.generation.engine import FinishReason, Piece, Request, check_requests
from polygpt.generation.sampling import NOT_FINITE, Sampling, sample, stack_samplers, token_keys
from polygpt.model import Model, ModelConfig, Params, model_of

_SHORTEST = 16


def generate_constrained(model: Model, params: Params, request: Request, matcher: Matcher) -> Iterator[Piece]:
    """Continues a prompt along a grammar; ends with `stop` once the text is complete.

    Raises:
        RequestError: as `check_requests`, or the constraint cannot be followed.
        PolygptError: logits are not finite numbers.
    """
    check_requests(model.config, [request])
    length, unread, fresh = len(request.prompt), list(request.prompt), True
    limit = min(length + request.max_new_tokens, model.longest_sequence)
    out_of_room: FinishReason = "length" if limit == length + request.max_new_tokens else "context_length"
    state = model.init_state(1, min(_rounded(limit), model.longest_sequence))
    sampling, seed = stack_samplers([request.sampler]), np.array([request.seed], np.uint32)
    step = _step_of(model.config)
    while length < limit and not matcher.stopped:
        new = matcher.forced()[: limit - length]
        if not new:
            allowed = _padded(matcher.allowed(), model.config.vocab_size)
            tokens = np.zeros((1, _rounded(len(unread)) if len(unread) > 1 else 1), np.int32)
            tokens[0, : len(unread)] = unread
            start, count = jnp.int32(length - len(unread)), jnp.int32(len(unread))
            drawn, state = step(params, tokens, start, count, allowed, sampling, seed, state, fresh=fresh)
            new, unread, fresh = [int(drawn)], [], False
            if new[0] == NOT_FINITE:
                raise PolygptError("the model's logits are not finite numbers, or its constraint allows no token of it")
            if new[0] in request.stops:
                yield Piece([], "stop")
                return
            matcher.take(new)
        unread += new
        length += len(new)
        yield Piece(new, None)
    yield Piece([], "stop" if matcher.stopped else out_of_room)


def continue_constrained(
    model: Model,
    params: Params,
    continuations: Sequence[Continuation],
    vocabulary: Vocabulary,
    grammar: str,
    on_text: Callable[[str], None] | None = None,
) -> None:
    """Runs all requests, one after the other, along one grammar, and fills in their outcome.

    Raises:
        RequestError, PolygptError: as `generate_constrained`.
    """
    for continuation in continuations:
        for piece in generate_constrained(model, params, continuation.request, Matcher(vocabulary, grammar)):
            continuation.tokens += piece.tokens
            continuation.finish_reason = piece.finish_reason
            text = "" if continuation.stream is None else feed(continuation, piece.tokens)
            if text and on_text is not None:
                on_text(text)
            if continuation.finish_reason is not None:
                break  # a stop string ends it here


@lru_cache(maxsize=16)
def _step_of(config: ModelConfig) -> jax.stages.Wrapped:
    model = model_of(config)

    @partial(jax.jit, static_argnames="fresh")
    def step(
        params: Params,
        tokens: Array,
        start: Array,
        count: Array,
        allowed: Array,
        sampling: Sampling,
        seed: Array,
        state: PyTree,
        *,
        fresh: bool,
    ) -> tuple[Array, PyTree]:
        """Reads tokens [1, T], of which `count` are real, and samples the next one among `allowed`."""
        decoder = model.module(params)
        index = jnp.arange(tokens.shape[1])[None]
        output = decoder(tokens, positions=start + index, valid=index < count, state=state, fresh=fresh)
        logits = decoder.logits(output.hidden[:, count - 1])
        keys = token_keys(seed, (start + count)[None])
        return sample(jnp.where(allowed, logits, -jnp.inf), sampling, keys)[0], output.state

    return step


def _padded(allowed: np.ndarray, size: int) -> np.ndarray:
    """The mask for a model with more ids than its tokenizer; the others are never allowed."""
    return np.pad(allowed, (0, max(size - len(allowed), 0)))[:size]


def _rounded(count: int) -> int:
    """`count` rounded up to a power of two, so that few programs are compiled."""
    return max(_SHORTEST, 1 << (count - 1).bit_length())
