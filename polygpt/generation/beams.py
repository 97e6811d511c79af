"""Beam search: the likeliest continuations of a prompt, found by keeping several at every step.

Knows token ids and a model; nothing of text. The steps are those of transformers' `generate(num_beams=...)`, whose ids
and scores it gives; diverse groups are those of Vijayakumar et al. 2016 (arXiv 1610.02424).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from polygpt.errors import PolygptError, RequestError
from polygpt.generation.beam_programs import EARLY, Rules, Search, beam_programs
from polygpt.generation.prompts import as_whole
from polygpt.generation.requests import FinishReason, Request, check_requests
from polygpt.generation.sampling import DAMAGED, Sampler
from polygpt.model import Model, Params

EarlyStopping = Literal["never"] | bool
MOST_BEAMS = 1024
# So that scores do not leave the range of float32: 10^5 tokens to the 5th power are 10^25.
LENGTH_PENALTIES, DIVERSITY_PENALTIES = (-5, 5), (0, 10_000)
_SHORTEST = 16  # of prompts and continuations as they are compiled; doubled until everything fits


@dataclass(frozen=True)
class BeamSettings:
    """How beams are searched.

    Attributes:
        beams: continuations that are kept at every step.
        length_penalty: a continuation's score is the sum of its log probabilities divided by
            (its number of tokens)^length_penalty: a positive penalty favours long continuations, a negative one short;
            -5 to 5.
        early_stopping: True ends the search once `beams` continuations have ended; False, when the best unfinished
            one would not rank among them if it ended now; `never`, when none can, however long it becomes.
        beam_groups: groups that the beams are divided into; each is searched by itself.
        diversity_penalty: subtracted from a token's log probability, where beams are chosen, once for each beam of an
            earlier group that takes the same token at the same step; 0 to 10,000. Scores do not contain it.
        n: how many continuations are given, the best first.
    """

    beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    beam_groups: int = 1
    diversity_penalty: float = 0.0
    n: int = 1

    def check(self) -> None:
        """Refuses settings that mean nothing.

        Raises:
            RequestError: names the setting.
        """
        as_whole(self.beams, "beams", 1, MOST_BEAMS)
        as_whole(self.beam_groups, "beam_groups", 1)
        as_whole(self.n, "n", 1)
        if self.n > self.beams:
            raise RequestError(f"{self.beams} beams give at most {self.beams} continuations, not n={self.n}")
        if self.beams % self.beam_groups:
            raise RequestError(f"{self.beams} beams cannot be divided into {self.beam_groups} groups of one size")
        bounds = {"length_penalty": LENGTH_PENALTIES, "diversity_penalty": DIVERSITY_PENALTIES}
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise RequestError(f"{name} must be a number in {least:g}..{most:g}, not {value!r:.40}")
        if self.diversity_penalty and self.beam_groups == 1:
            raise RequestError("diversity_penalty sets groups apart: give beam_groups as well")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(f"early_stopping must be True, False or 'never', not {self.early_stopping!r:.40}")


class Beam(NamedTuple):
    """One continuation: its ids without the stop token, its score, and why it ended."""

    tokens: list[int]
    score: float
    finish_reason: FinishReason


def search_beams(
    model: Model,
    params: Params,
    requests: Sequence[Request],
    settings: BeamSettings,
    vocab_size: int | None = None,
) -> list[list[Beam]]:
    """The `n` best continuations of each request, the best first; fewer where fewer exist.

    Ids from `vocab_size` on are never taken (the tokenizer's, where the model's is larger). Requests are searched one
    after the other: the beams of one fill the machine. Samplers and seeds are ignored.

    Raises:
        RequestError: as `check_requests`, or the settings mean nothing.
        PolygptError: logits are not finite numbers.
    """
    settings.check()
    check_requests(model.config, requests)
    vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    return [_search(model, params, request, settings, vocab_size) for request in requests]


def refuse_with_beams(settings: Mapping[str, Any], sampler: Sampler) -> None:
    """Refuses what beam search would ignore: it chooses by probability alone, and its text is only known at the end.

    Raises:
        RequestError: names the setting.
    """
    given = [name for name, value in settings.items() if value]
    changed = sampler.model_dump(exclude_defaults=True)
    given += [name for name in changed if (name, sampler.temperature) != ("temperature", 0)]
    if given:
        raise RequestError(f"beam search takes no {given[0]}: leave it out, or leave beams out to sample")


def _search(model: Model, params: Params, request: Request, settings: BeamSettings, vocab_size: int) -> list[Beam]:
    prompt = np.asarray(request.prompt, np.int32)
    budget = request.limit(model.longest_sequence) - len(prompt)
    if budget < 1:
        return [Beam([], 0.0, "context_length")]
    groups, each = settings.beam_groups, settings.beams // settings.beam_groups
    room = _rounded(budget)
    programs = beam_programs(model.config, groups, each, room)
    tokens = np.zeros((1, min(_rounded(len(prompt)), model.config.context_length)), np.int32)
    tokens[0, : len(prompt)] = prompt
    state = model.init_state(1, min(_rounded(len(prompt) + room), model.longest_sequence))
    rules = _rules_of(request, settings, len(prompt), budget, vocab_size)
    search = programs.start(params, tokens, rules, state)
    while _goes_on(search, budget):
        search = programs.advance(params, search, rules)
    ends = "length" if budget == request.max_new_tokens else "context_length"
    return _results(search, set(request.stops), ends)[: settings.n]


def _rules_of(request: Request, settings: BeamSettings, length: int, budget: int, vocab_size: int) -> Rules:
    stops = np.full(_rounded(len(request.stops)), -1, np.int32)
    stops[: len(request.stops)] = request.stops
    return Rules(
        jnp.int32(length),
        jnp.int32(budget),
        jnp.int32(vocab_size),
        jnp.asarray(stops),
        jnp.float32(settings.length_penalty),
        jnp.float32(settings.diversity_penalty),
        jnp.int32(EARLY.index(settings.early_stopping)),
    )


def _goes_on(search: Search, budget: int) -> bool:
    if not bool(search.finite):
        raise PolygptError(DAMAGED)
    return bool(search.open.any()) and int(search.length) < budget


def _results(search: Search, stops: set[int], ends: FinishReason) -> list[Beam]:
    """The finished continuations of all groups, the best first."""
    ended = search.ended
    scores, lengths = (np.asarray(values).ravel() for values in (ended.scores, ended.lengths))
    rows = np.asarray(ended.tokens).reshape(len(scores), -1)
    beams = []
    for index in np.argsort(-scores, kind="stable"):
        if not np.isfinite(scores[index]):
            break
        tokens = rows[index, : lengths[index]].tolist()
        stopped = tokens[-1] in stops
        beams.append(Beam(tokens[:-1] if stopped else tokens, float(scores[index]), "stop" if stopped else ends))
    return beams


def _rounded(count: int) -> int:
    """`count` rounded up to a power of two, so that few programs are compiled."""
    return max(_SHORTEST, 1 << (count - 1).bit_length() if count else 0)
