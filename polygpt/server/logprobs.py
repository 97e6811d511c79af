"""Log probabilities in the two forms of OpenAI's API, and in one of ours that has token ids."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Any

from polygpt.generation import Logprob
from polygpt.server.served import Served

# Stands for -inf, which JSON has no number for.
LOWEST = -9999.0


class Offsets:
    """Where each token of a choice begins in its text, however the tokens come in parts."""

    def __init__(self, served: Served):
        self._served, self._count = served, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, tokens: Sequence[int]) -> list[int]:
        """The characters before each of the next tokens; a part of a character begins where the character does."""
        starts = []
        for token in tokens:
            starts.append(self._count)
            self._count += len(self._decoder.decode(self._served.token_bytes(token)))
        return starts


def completion_logprobs(
    served: Served, tokens: Sequence[int], scores: Sequence[Logprob | None], offsets: Offsets
) -> dict[str, Any]:
    """The form of `/v1/completions`.

    Args:
        served: the model.
        tokens: ids.
        scores: of each; None for the first id of an echoed prompt, which nothing predicts.
        offsets: of the choice.
    """
    pairs = zip(tokens, scores, strict=True)
    tops = [None if score is None else _top(served, token, score) for token, score in pairs]
    return {
        "tokens": [served.token_text(token) for token in tokens],
        "token_logprobs": [None if score is None else _number(score.logprob) for score in scores],
        "top_logprobs": tops,
        "text_offset": offsets.take(tokens),
    }


def chat_logprobs(
    served: Served, tokens: Sequence[int], scores: Sequence[Logprob | None], with_ids: bool
) -> list[dict[str, Any]]:
    """The `content` of the form of `/v1/chat/completions`; with the ids of tokens if asked."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = served.token_bytes(token)
        own = {"id": token} if with_ids else {}
        number = None if logprob is None else _number(logprob)
        return {"token": served.token_text(token), "logprob": number, "bytes": list(data), **own}

    found = []
    for token, score in zip(tokens, scores, strict=True):
        top = [] if score is None else [entry(*pair) for pair in score.top]
        found.append(entry(token, None if score is None else score.logprob) | {"top_logprobs": top})
    return found


def _top(served: Served, chosen: int, score: Logprob) -> dict[str, float]:
    """The likeliest tokens, and after them the chosen one if it is none of them, as OpenAI's API has it."""
    top: dict[str, float] = {}
    for token, logprob in [*score.top, (chosen, score.logprob)]:  # two ids may have one text: the likelier stays
        top.setdefault(served.token_text(token), _number(logprob))
    return top


def _number(logprob: float) -> float:
    if math.isnan(logprob):
        raise ValueError("a log probability is NaN, which JSON has no number for")
    return max(logprob, LOWEST)
