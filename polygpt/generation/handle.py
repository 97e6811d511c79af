"""A request in the engine, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from polygpt.errors import PolygptError
from polygpt.generation.constraints import Matcher
from polygpt.generation.sampling import DAMAGED, NOT_FINITE
from polygpt.generation.slots import Decoded
from polygpt.generation.speculation import Lookup
from polygpt.generation.text import TextStream

if TYPE_CHECKING:
    from polygpt.generation.engine import Engine
    from polygpt.generation.requests import Request

# From so many on, tokens that a constraint leaves no choice of are read at once; fewer cost no more one by one.
FEWEST_FORCED = 4


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


Listener = Callable[["Handle", Part | None], None]


class Handle:
    """A submitted request. Iterating over it gives its parts as they come, and runs the engine as far as needed.

    Whatever came meanwhile, by steps of another thread or before the iteration, is one part.

    Attributes:
        request: what is continued, and how.
        stream: its text; None leaves it at tokens.
        tokens: the new ids that were given out so far.
        logprobs: theirs, if asked for.
        text: theirs; None without a stream.
        finish_reason: `length`, `stop`, `context_length` or `cancelled`; None until it has ended, or if it failed.
        error: why it failed, if it did; iterating raises it.
        ended: no more parts come.
        cached_tokens: tokens of the prompt that did not have to be read; None until it is read.
        decoded, seconds: tokens that were decoded for it and the time this took, that of its neighbours included.
        drafted, accepted: tokens that speculation proposed, and those that turned out right.
        lookup: proposes them, if the engine looks them up.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        stream: TextStream | None,
        budget: int,
        listener: Listener | None = None,
    ):
        self.request, self.stream = request, stream
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []
        self.text = None if stream is None else ""
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.ended = False
        self.cached_tokens: int | None = None
        self.decoded, self.seconds = 0, 0.0
        self.drafted = self.accepted = 0
        self.lookup: Lookup | None = None
        self.matcher = None if request.constraint is None else Matcher(request.constraint)
        self._stops = set(request.stops) | ({self.matcher.end} if self.matcher is not None else set())
        self._engine, self._budget, self._listener = engine, budget, listener
        self._received: list[int] = []
        self._scores: list[Logprob] = []
        self._given = self._progress

    def __iter__(self) -> Iterator[Part]:
        while not self.ended or self.has_new:  # in this order: another thread may end it in between
            if self.has_new:
                yield self._new()
            else:
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

    @property
    def has_new(self) -> bool:
        """Something has come that iterating has not given yet."""
        return self._progress != self._given

    @property
    def room(self) -> int:
        """How many tokens may still come."""
        return self._budget - len(self._received)

    @property
    def complete(self) -> bool:
        """The constraint is met, and nothing may follow."""
        return self.matcher is not None and self.matcher.stopped

    def receive(self, tokens: list[int], scores: list[Logprob]) -> Part | None:
        """Takes what was decoded; what belongs to the request comes back as a part, if it is not held back.

        Raises:
            PolygptError: there is no token, since logits were not finite, or none that goes on along the constraint.
        """
        tokens, reason = self._cut(tokens)
        if self.matcher is not None:
            self.matcher.take(tokens)
        return self._take(tokens, scores, reason)

    def receive_forced(self, tokens: list[int]) -> Part | None:
        """Takes tokens that the matcher has taken already."""
        tokens, reason = self._cut(tokens)
        return self._take(tokens, [], reason)

    def end(self, reason: str) -> Part | None:
        """Ends it as it is."""
        return self._give(len(self.tokens), "", reason)

    def fail(self, error: Exception) -> None:
        """Ends it with an error."""
        self.error, self.ended = error, True
        self._tell(None)

    def _take(self, tokens: list[int], scores: list[Logprob], reason: str | None) -> Part | None:
        reason = "stop" if self.complete else reason
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

    def _give(self, count: int, text: str, reason: str | None) -> Part | None:
        start = len(self.tokens)
        part = Part(self._received[start:count], text, self._scores[start:count], reason)
        if not (part.tokens or text or reason):
            return None
        self.tokens += part.tokens
        self.logprobs += part.logprobs
        if self.text is not None:
            self.text += text
        self.finish_reason, self.ended = reason, reason is not None
        self._tell(part)
        return part

    @property
    def _progress(self) -> tuple[int, int, str | None]:
        return len(self.tokens), len(self.text or ""), self.finish_reason

    def _new(self) -> Part:
        with self._engine._lock:
            (start, shown, _), self._given = self._given, self._progress
            return Part(self.tokens[start:], (self.text or "")[shown:], self.logprobs[start:], self.finish_reason)

    def _tell(self, part: Part | None) -> None:
        if self._listener is None:
            return
        try:
            self._listener(self, part)
        except Exception as error:
            self._listener = None
            self.error, self.ended = error, True

    def _cut(self, tokens: list[int]) -> tuple[list[int], str | None]:
        """The tokens up to the request's end, and the reason if they hold it."""
        tokens = tokens[: self.room]
        at = next((i for i, token in enumerate(tokens) if token in self._stops), None)
        if at is not None:
            return tokens[:at], "stop"
        if NOT_FINITE in tokens:
            raise PolygptError(DAMAGED)
        if len(tokens) < self.room:
            return tokens, None
        return tokens, "length" if self._budget == self.request.max_new_tokens else "context_length"


def forced_tokens(handle: Handle) -> list[int]:
    """The next tokens if its constraint leaves no choice, which the matcher then has taken; none where they are few.

    Log probabilities take a step for each token, so with them nothing is forced.
    """
    if handle.request.logprobs is not None:
        return []
    forced = handle.matcher.forced()[: handle.room]
    if len(forced) < FEWEST_FORCED:
        return []
    handle.matcher.take(forced)
    return forced


def scores_of(decoded: Decoded, slot: int, count: int) -> list[Logprob]:
    """The log probabilities of a slot's tokens, and of `count` of the likeliest at each."""
    steps = int(decoded.counts[slot])
    tops = zip(decoded.top_tokens[slot, :steps, :count], decoded.top_logprobs[slot, :steps, :count], strict=True)
    return [
        Logprob(float(own), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
        for own, (tokens, values) in zip(decoded.logprobs[slot, :steps], tops, strict=True)
    ]
