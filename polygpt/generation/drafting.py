"""The drafts of all slots, and what is learned from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from polygpt.generation.handle import Handle
from polygpt.generation.runner import SlotRunner
from polygpt.generation.speculation import DRAFTED, DraftTokens, Speculation, draft_by_lookup


def draft_next(
    draft: Speculation, runner: SlotRunner, running: Sequence[Handle | None], active: Bool[np.ndarray, "B"]
) -> DraftTokens:
    """Draft tokens for the next positions; none for requests with a constraint."""
    rows = [handle if is_active else None for handle, is_active in zip(running, active, strict=True)]
    rooms = [0 if handle is None or handle.matcher is not None else handle.room - 1 for handle in rows]
    if draft == "lookup":
        return draft_by_lookup([None if handle is None else handle.lookup for handle in rows], rooms)
    counts = np.clip(rooms, 0, DRAFTED).astype(np.int32)
    return DraftTokens(runner.draft(counts > 0) if counts.any() else None, counts)


def learn(handle: Handle, tokens: list[int], drafted: int, steps: int) -> tuple[int, int]:
    """Gives how many tokens were drafted and how many were accepted: all of those that came but the last."""
    right = len(tokens) - 1 if drafted else 0
    handle.drafted += drafted
    handle.accepted += right
    if handle.lookup is not None:
        handle.lookup.judge(drafted, right, steps)
        handle.lookup.extend(tokens)
    return drafted, right
