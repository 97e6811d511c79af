"""What generation gives to those who call it: text, ids, and how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polygpt.generation.beams import Beam
from polygpt.generation.handle import Handle
from polygpt.generation.requests import FinishReason
from polygpt.generation.text import Decode


@dataclass(frozen=True)
class Generation:
    """A generated continuation, without the prompt.

    Attributes:
        text: the new tokens as text, up to a stop string; None for a model without tokenizer.
        tokens: the ids of that text.
        finish_reason: `length` (max_new_tokens reached), `stop` (end of text or a stop string), or
            `context_length` (the sequence fills the model's context).
        tokens_per_second: of decoding, beside those it was decoded with; the prompt and compilation left out. None for
            beam search, and if no token was decoded.
        logprobs: of `tokens` in nats, by the model alone, if asked for.
        top_logprobs: for each token, (id, log probability) of the likeliest, if asked for.
        acceptance: with speculation, which share of the drafted tokens was right; None if there were none.
    """

    text: str | None
    tokens: list[int]
    finish_reason: FinishReason
    tokens_per_second: float | None
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None

    acceptance: float | None = None

    @classmethod
    def of(cls, done: Handle) -> Generation:
        """The result of a finished request."""
        asked = done.request.logprobs
        return cls(
            text=done.text,
            tokens=done.tokens,
            finish_reason=done.finish_reason,
            tokens_per_second=done.decoded / done.seconds if done.seconds else None,
            logprobs=None if asked is None else [score.logprob for score in done.logprobs],
            top_logprobs=[list(score.top) for score in done.logprobs] if asked else None,
            acceptance=done.accepted / done.drafted if done.drafted else None,
        )


@dataclass(frozen=True)
class ScoredGeneration(Generation):
    """A continuation that beam search found; `score` is as `BeamSettings` says, the stop token included."""

    score: float = 0.0

    @classmethod
    def of_beam(cls, prompt: Sequence[int], beam: Beam, decode: Decode | None) -> ScoredGeneration:
        """The result of a beam; without `decode` its text is None."""
        text = None if decode is None else decode(prompt, beam.tokens)
        return cls(text, beam.tokens, beam.finish_reason, None, score=beam.score)
