"""Generation: the prompt in one pass, then a compiled loop that decodes token by token over a preallocated cache.

Knows token ids, a model and a sampler; nothing of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from polygpt.errors import RequestError
from polygpt.generation.samplers import Sampler
from polygpt.model import Model, ModelConfig, Params

FinishReason = Literal["length", "stop", "context_length"]
# Tokens decoded between two looks from outside (streaming, stop strings). Compiled once for this size.
CHUNK = 16


class Progress(NamedTuple):
    """Where a batch of sequences stands, on the device.

    Attributes:
        token: the last token of each row, not yet seen by the model; int32 [B].
        position: its index in the sequence; int32 [B].
        state: the decoding state after everything before it.
        done: rows that have met the stop token; bool [B].
        count: tokens sampled so far, int32; each has its own key.
    """

    token: Int[Array, "B"]
    position: Int[Array, "B"]
    state: PyTree
    done: Int[Array, "B"]
    count: Int[Array, ""]


def generate_tokens(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    seed: int = 0,
    stop_tokens: tuple[int, ...] = (),
) -> Iterator[list[tuple[list[int], FinishReason | None]]]:
    """Continues each prompt; yields, chunk by chunk, each row's new tokens and, when it ends, the reason.

    The stop token that ends a row is not given. A row whose sequence fills the context ends with `context_length`.

    Raises:
        RequestError: a prompt is empty or longer than the context, or max_new_tokens is not positive.
    """
    _check(model.config, prompts, max_new_tokens)
    lengths = np.array([len(prompt) for prompt in prompts])
    context = model.config.context_length
    budget = np.minimum(max_new_tokens, context - lengths)
    reasons: list[FinishReason] = ["length" if n == max_new_tokens else "context_length" for n in budget]
    if budget.max() == 0:
        yield [([], reason) for reason in reasons]
        return
    programs = _programs(model.config, sampler, stop_tokens)
    padded = np.zeros((len(prompts), _bucket(int(lengths.max()), context)), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    state = model.init_state(len(prompts), _slots(int((lengths + budget).max()), context))
    key = jax.random.key(seed)
    progress = programs.prefill(params, padded, jnp.asarray(lengths, jnp.int32), state, key)
    first = np.asarray(progress.token)[:, None]
    ended = np.zeros(len(prompts), bool)
    produced = 0
    while True:
        chunk: list[tuple[list[int], FinishReason | None]] = []
        for row, tokens in enumerate(first.tolist()):
            left = int(budget[row]) - produced
            at = next((i for i, token in enumerate(tokens[:left]) if token in stop_tokens), None)
            stopped = at is not None
            kept = [] if ended[row] else tokens[: at if stopped else left]
            finish = None
            if not ended[row] and (stopped or left <= len(tokens)):
                finish, ended[row] = ("stop" if stopped else reasons[row]), True
            chunk.append((kept, finish))
        yield chunk
        produced += first.shape[1]
        if ended.all():
            return
        progress, tokens = programs.decode(params, progress, key)
        first = np.asarray(tokens)


class _Programs(NamedTuple):
    prefill: jax.stages.Wrapped
    decode: jax.stages.Wrapped


@lru_cache(maxsize=16)
def _programs(config: ModelConfig, sampler: Sampler, stop_tokens: tuple[int, ...]) -> _Programs:
    """The two compiled functions, shared by all calls with the same model, sampler and stop tokens."""
    model = Model(config)

    def choose(hidden: Array, decoder, count: Array, key: PRNGKeyArray, done: Array) -> tuple[Array, Array]:
        token = sampler.sample(decoder.logits(hidden), jax.random.fold_in(key, count))
        return token, done | jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32))

    @partial(jax.jit, donate_argnums=3)
    def prefill(params: Params, tokens: Array, lengths: Array, state: PyTree, key: PRNGKeyArray) -> Progress:
        decoder = model.module(params)
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        output = decoder(tokens, state=state, valid=real, fresh=True)
        last = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        token, done = choose(last, decoder, jnp.int32(0), key, jnp.zeros(tokens.shape[0], bool))
        return Progress(token, lengths, output.state, done, jnp.int32(1))

    @partial(jax.jit, donate_argnums=1)
    def decode(params: Params, progress: Progress, key: PRNGKeyArray) -> tuple[Progress, Array]:
        decoder = model.module(params)
        empty = jnp.zeros((progress.token.shape[0], CHUNK), jnp.int32)

        def going(carry: tuple[Array, Array, Progress]) -> Array:
            index, _, progress = carry
            return (index < CHUNK) & ~progress.done.all()

        def one(carry: tuple[Array, Array, Progress]) -> tuple[Array, Array, Progress]:
            index, tokens, (token, position, state, done, count) = carry
            output = decoder(token[:, None], positions=position[:, None], state=state)
            token, done = choose(output.hidden[:, 0], decoder, count, key, done)
            progress = Progress(token, position + 1, output.state, done, count + 1)
            return index + 1, tokens.at[:, index].set(token), progress

        _, tokens, progress = jax.lax.while_loop(going, one, (jnp.int32(0), empty, progress))
        return progress, tokens

    return _Programs(prefill, decode)


def _bucket(length: int, context: int) -> int:
    """`length` rounded up to one of a few sizes, so that few programs are compiled."""
    size = CHUNK
    while size < length:
        size *= 2
    return min(size, context)


def _slots(length: int, context: int) -> int:
    """`length` rounded up to a quarter of a power of two: every token passes over all slots, the empty ones too."""
    quarter = max(_bucket(length, 2 * length) // 8, CHUNK)
    return min(-(-length // quarter) * quarter, context)


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    for prompt in prompts:
        if not len(prompt):
            raise RequestError("the prompt is empty and the tokenizer has no end-of-text token to start from")
        if len(prompt) > config.context_length:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, model.context_length is {config.context_length}: shorten it"
            )
        bad = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if bad is not None:
            raise RequestError(f"token {bad} is outside the model's vocabulary of {config.vocab_size}")
