"""A request in the engine, and what becomes of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from polygpt.errors import PolygptError
from polygpt.generation.sampling import NOT_FINITE
from polygpt.generation.text import TextStream

if TYPE_CHECKING:
    from polygpt.generation.engine import Request
    from polygpt.generation.serving import Engine

DAMAGED = (
    "the model's logits are not finite numbers (NaN or infinity), so no token can be chosen: "
    "its weights are damaged, or its numbers exceed the range of compute_dtype"
)


class Logprob(NamedTuple):
    """The log probability of a token, in nats, and (id, log probability) of the likeliest, as many as were asked."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Part(NamedTuple):
    """A piece of a continuation: new tokens, their text and, if asked for, their log probabilities.

    The last one has the reason why it ended. Parts joined are the whole: no token of a stop string is among them.
    """

    tokens: list[int]
    text: str
    logprobs: list[Logprob]
    finish_reason: str | None


class Handle:
    """A submitted request. Iterating over it gives its parts as they come, and runs the engine as far as needed.

    Attributes:
        request: what is continued, and how.
        stream: its text; None leaves it at tokens.
        tokens: the new ids that were given out so far.
        logprobs: theirs, if asked for.
        text: theirs; None without a stream.
        finish_reason: `length`, `stop`, `context_length` or `cancelled`; None until it has ended, or if it failed.
        error: why it failed, if it did; iterating raises it.
        ended: no more parts come.
        cached_tokens: how many of the prompt's ids were not read, since their state was kept from an earlier request.
    """

    def __init__(self, engine: Engine, request: Request, stream: TextStream | None, budget: int):
        self.request, self.stream = request, stream
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []
        self.text = None if stream is None else ""
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.ended = False
        self.cached_tokens = 0
        self._engine, self._budget = engine, budget
        self._received: list[int] = []
        self._scores: list[Logprob] = []
        self._parts: deque[Part] = deque()

    def __iter__(self) -> Iterator[Part]:
        while True:
            while self._parts:
                yield self._parts.popleft()
            if self.ended and not self._parts:
                break
            self._engine.step(waiting=self)
        if self.error is not None:
            raise self.error

    def result(self) -> Handle:
        """Runs the engine until the request has ended.

        Raises:
            PolygptError: it failed.
        """
        for _ in self:
            pass
        return self

    def cancel(self) -> None:
        """Ends it with what was given out so far; its slot is free from the next step on."""
        self._engine.cancel(self)

    def receive(self, tokens: list[int], scores: list[Logprob]) -> Part | None:
        """Takes what was decoded; what belongs to the request comes back as a part, if it is not held back."""
        tokens, reason = self._cut(tokens)
        self._received += tokens
        self._scores += scores[: len(tokens)]
        text, count = "", len(self._received)
        if self.stream is not None:
            text = self.stream.feed(tokens)
            if reason is not None or self.stream.stopped:
                text += self.stream.close()
                reason = "stop" if self.stream.stopped else reason
                count = len(self.stream.tokens)
            else:
                count = self.stream.shown_tokens
        return self._give(count, text, reason)

    def end(self, reason: str) -> Part | None:
        """Ends it where it stands."""
        return self._give(len(self.tokens), "", reason)

    def fail(self, error: Exception) -> None:
        """Ends it with an error."""
        self.error, self.ended = error, True

    def _give(self, count: int, text: str, reason: str | None) -> Part | None:
        start = len(self.tokens)
        part = Part(self._received[start:count], text, self._scores[start:count], reason)
        if not (part.tokens or text or reason):
            return None
        self.tokens += part.tokens
        self.logprobs += part.logprobs
        if self.text is not None:
            self.text += text
        self._parts.append(part)
        self.finish_reason, self.ended = reason, reason is not None
        return part

    def _cut(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """The tokens up to the request's end, and the reason if they hold it."""
        tokens = tokens[: self._budget - len(self._received)]
        stops = self.request.stops
        at = next((i for i, token in enumerate(tokens) if token in stops), None)
        if at is not None:
            return tokens[:at], "stop"
        if NOT_FINITE in tokens:
            raise PolygptError(DAMAGED)
        if len(self._received) + len(tokens) < self._budget:
            return tokens, None
        return tokens, "length" if self._budget == self.request.max_new_tokens else "context_length"
