"""What generation gives to those who call it: text, ids, and how they came about."""

from __future__ import annotations

from dataclasses import dataclass

from polygpt.generation.continuation import Continuation
from polygpt.generation.engine import FinishReason


@dataclass(frozen=True)
class Generation:
    """A generated continuation, without the prompt.

    Attributes:
        text: the new tokens as text, up to a stop string; None for a model without tokenizer.
        tokens: the ids of that text.
        finish_reason: `length` (max_new_tokens reached), `stop` (end of text or a stop string), or
            `context_length` (the sequence fills the model's context).
        tokens_per_second: of decoding after the first token, compilation left out; None if there was only one, or
            with penalties or log probabilities.
        logprobs: of `tokens` in nats, by the model alone, if asked for.
        top_logprobs: for each token, (id, log probability) of the likeliest, if asked for.
    """

    text: str | None
    tokens: list[int]
    finish_reason: FinishReason
    tokens_per_second: float | None
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None

    @classmethod
    def of(cls, done: Continuation) -> Generation:
        """The result of a finished continuation."""
        text = None if done.stream is None else done.stream.text
        asked = done.request.logprobs
        own = None if asked is None else [score.logprob for score in done.logprobs]
        top = [list(score.top) for score in done.logprobs] if asked else None
        return cls(text, done.tokens, done.finish_reason, done.tokens_per_second, own, top)


@dataclass(frozen=True)
class ScoredGeneration(Generation):
    """A continuation that beam search found; `score` is as `BeamSettings` says, the stop token included."""

    score: float = 0.0
