"""Requests run together, each with its stream of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from polygpt.errors import PolygptError
from polygpt.generation.engine import FinishReason, Request, check_requests, generate_tokens
from polygpt.generation.handle import Handle, Logprob
from polygpt.generation.programs import CHUNK
from polygpt.generation.serving import Engine
from polygpt.generation.text import TextStream
from polygpt.model import Model, Params

# Sequences that are decoded together.
BATCH = 16
# The engine's length is a multiple of this many tokens: few shapes, so few programs.
LENGTHS = 128


@dataclass
class Continuation:
    """A request and what becomes of it.

    Attributes:
        request: what is continued, and how.
        stream: its text; None leaves it at tokens.
        tokens: the new ids; those of the stream's text.
        logprobs: theirs, if the request asks for them.
        finish_reason: why it ended; None while it has not.
        tokens_per_second: of decoding after the first token, compilation left out; None where there was none.
    """

    request: Request
    stream: TextStream | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    tokens_per_second: float | None = None


def continue_all(
    model: Model,
    params: Params,
    continuations: Sequence[Continuation],
    on_text: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    vocab_size: int | None = None,
) -> None:
    """Runs all requests and fills in their outcome.

    Plain ones run in batches of prompts of similar length. Where any asks for penalties, a bias, log probabilities or a
    constraint, or the vocabulary is limited, all run through an `Engine`, which has these; ids are the same.

    Args:
        model: the decoder.
        params: its weights, which may be packed.
        continuations: what is to be run.
        on_text: called with each new piece of text.
        progress: called with (done, total) after each batch.
        vocab_size: ids from here on are never sampled; None allows all.

    Raises:
        RequestError: as `check_requests`, before any is run.
        PolygptError: logits are not finite numbers.
    """
    check_requests(model.config, [continuation.request for continuation in continuations])
    requests = [continuation.request for continuation in continuations]
    limited = vocab_size is not None and vocab_size < model.config.vocab_size
    if limited or any(r.logprobs is not None or r.sampler.edits_logits or r.constraint is not None for r in requests):
        _run_engine(model, params, continuations, on_text, progress, vocab_size)
        return
    ordered = sorted(continuations, key=lambda continuation: -len(continuation.request.prompt))
    for start in range(0, len(ordered), BATCH):
        _run_batch(model, params, ordered[start : start + BATCH], on_text)
        if progress is not None:
            progress(min(start + BATCH, len(ordered)), len(ordered))


def _run_engine(
    model: Model,
    params: Params,
    continuations: Sequence[Continuation],
    on_text: Callable[[str], None] | None,
    progress: Callable[[int, int], None] | None,
    vocab_size: int | None,
) -> None:
    most = max(len(each.request.prompt) + each.request.max_new_tokens for each in continuations)
    engine = Engine(
        model,
        params,
        slots=min(len(continuations), BATCH),
        length=max(min(-(-most // LENGTHS) * LENGTHS, model.longest_sequence), 2),
        queue=len(continuations),
        vocab_size=vocab_size,
    )
    handles: dict[Handle, Continuation] = {engine.submit(each.request, each.stream): each for each in continuations}
    done = 0
    while done < len(handles):
        for _, part in engine.step(CHUNK):
            if part.text and on_text is not None:
                on_text(part.text)
        failed = next((handle.error for handle in handles if handle.error is not None), None)
        if failed is not None:
            raise failed if isinstance(failed, PolygptError) else PolygptError(str(failed))
        ended = sum(handle.ended for handle in handles)
        if ended > done and progress is not None:
            progress(ended, len(handles))
        done = ended
    for handle, each in handles.items():
        each.tokens, each.logprobs, each.finish_reason = handle.tokens, handle.logprobs, handle.finish_reason


def _run_batch(
    model: Model, params: Params, batch: Sequence[Continuation], on_text: Callable[[str], None] | None
) -> None:
    decoded, seconds = [0] * len(batch), [0.0] * len(batch)
    for chunk in generate_tokens(model, params, [continuation.request for continuation in batch]):
        for row, (continuation, piece) in enumerate(zip(batch, chunk.pieces, strict=True)):
            if continuation.finish_reason is not None:
                continue
            if chunk.seconds is not None:
                decoded[row] += len(piece.tokens)
                seconds[row] += chunk.seconds
                continuation.tokens_per_second = decoded[row] / seconds[row]
            continuation.tokens += piece.tokens
            continuation.finish_reason = piece.finish_reason
            if continuation.stream is not None:
                text = feed(continuation, piece.tokens)
                if text and on_text is not None:
                    on_text(text)
        if all(continuation.finish_reason is not None for continuation in batch):
            return  # stop strings end a row here only


def feed(continuation: Continuation, tokens: list[int]) -> str:
    """Gives new tokens to the stream of text; a stop string there ends the continuation. Gives the new text."""
    stream = continuation.stream
    text = stream.feed(tokens)
    if continuation.finish_reason is not None or stream.stopped:
        text += stream.close()
        continuation.tokens = stream.tokens
    if stream.stopped:
        continuation.finish_reason = "stop"
    return text
