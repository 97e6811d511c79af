"""Requests run together, each with its stream of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from polygpt.generation.engine import FinishReason, Request, check_requests, generate_tokens
from polygpt.generation.text import TextStream
from polygpt.model import Model, Params

# Sequences that are decoded together.
BATCH = 16


@dataclass
class Continuation:
    """A request and what becomes of it.

    Attributes:
        request: what is continued, and how.
        stream: its text; None leaves it at tokens.
        tokens: the new ids; those of the stream's text.
        finish_reason: why it ended; None while it has not.
        tokens_per_second: of decoding after the first token, compilation left out; None where there was none.
    """

    request: Request
    stream: TextStream | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    tokens_per_second: float | None = None


def continue_all(
    model: Model,
    params: Params,
    continuations: Sequence[Continuation],
    on_text: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Runs all requests, in batches of prompts of similar length, and fills in their outcome.

    Args:
        model: the decoder.
        params: its weights, which may be packed.
        continuations: what is to be run.
        on_text: called with each new piece of text.
        progress: called with (done, total) after each batch.

    Raises:
        RequestError: as `check_requests`, before any is run.
        PolygptError: logits are not finite numbers.
    """
    check_requests(model.config, [continuation.request for continuation in continuations])
    ordered = sorted(continuations, key=lambda continuation: -len(continuation.request.prompt))
    for start in range(0, len(ordered), BATCH):
        _run_batch(model, params, ordered[start : start + BATCH], on_text)
        if progress is not None:
            progress(min(start + BATCH, len(ordered)), len(ordered))


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
