"""Counts of what an engine has done."""

from __future__ import annotations

from typing import NamedTuple


class Statistics(NamedTuple):
    """What an engine has done so far, and what it holds now.

    Attributes:
        slots, slots_in_use: sequences that can be and are decoded together.
        queued: requests that wait for a slot.
        requests: that were submitted.
        prompt_tokens: of the prompts that have been read.
        cached_tokens: how many of them came from the prefix cache.
        tokens: that were decoded, those that a constraint forced included.
        steps: passes of the model over all slots.
        drafted, accepted: tokens that speculation proposed, and those that turned out right.
    """

    slots: int
    slots_in_use: int
    queued: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    steps: int
    drafted: int
    accepted: int
