"""Requests run to their end: the engine for those who have all their requests at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polygpt.errors import PolygptError
from polygpt.generation.engine import Engine
from polygpt.generation.handle import Handle
from polygpt.generation.requests import Request, check_requests
from polygpt.generation.slots import CHUNK
from polygpt.generation.speculation import Speculation
from polygpt.generation.text import TextStream
from polygpt.model import Model, Params

# Sequences that are decoded together.
SLOTS = 16
# The engine's length is a multiple of this many tokens: few shapes, so few programs.
LENGTHS = 128
# Tokens of a prompt that are read at once: nobody waits for the next token of another.
READ = 512


def engine_for(
    model: Model,
    params: Params,
    requests: Sequence[Request],
    *,
    vocab_size: int | None = None,
    draft: Speculation | None = None,
) -> Engine:
    """An engine that has room for all of these requests; its shape depends on them alone.

    Raises:
        RequestError: as `check_requests`, or speculation is not possible.
    """
    check_requests(model.config, requests)
    most = max(request.limit(model.longest_sequence) for request in requests)
    length = max(min(-(-most // LENGTHS) * LENGTHS, model.longest_sequence), 2)
    slots = min(len(requests), SLOTS)
    return Engine(
        model,
        params,
        slots=slots,
        length=length,
        queue=len(requests),
        chunk=READ,
        cache_bytes=0 if len(requests) == 1 else 2**28,
        vocab_size=vocab_size,
        draft=draft,
    )


def run_all(
    engine: Engine,
    requests: Sequence[Request],
    streams: Sequence[TextStream | None] | None = None,
    on_text: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Handle]:
    """Runs all requests to their end; the handles are in the order of the requests.

    Args:
        engine: which has nothing else to do.
        requests: what is run.
        streams: their texts; None leaves them at tokens.
        on_text: called with each new piece of text.
        progress: called with (done, total) as requests end.

    Raises:
        RequestError: a request is impossible.
        PolygptError: logits are not finite numbers.
    """
    streams = [None] * len(requests) if streams is None else streams
    handles = [engine.submit(request, stream) for request, stream in zip(requests, streams, strict=True)]
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
    return handles
