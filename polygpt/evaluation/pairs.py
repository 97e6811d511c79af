"""A context and its continuation as ids, divided where lm-evaluation-harness divides them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polygpt.errors import RequestError

Ids = Sequence[int]
Pair = tuple[Ids, Ids]
EncodeAll = Callable[[Sequence[str]], Sequence[Ids]]


def encode_pairs(
    texts: Sequence[tuple[str, str]], encode_all: EncodeAll, context_length: int, where: Sequence[str]
) -> list[Pair]:
    """Ids of each (context, continuation), neither of them empty.

    Spaces at the end of a context go to its continuation. Both together are encoded, and what is left after as many
    ids as the context alone has is the continuation (`TemplateLM._encode_pair` of lm-evaluation-harness).

    Args:
        texts: the contexts and continuations.
        encode_all: texts to ids.
        context_length: the most ids that a continuation may have.
        where: for each pair, what an error is to name.

    Raises:
        RequestError: nothing is left for a continuation, or it is longer than the context_length.
    """
    moved = [_move_spaces(*pair) for pair in texts]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    try:
        ids = dict(zip(contexts, encode_all(contexts), strict=True))
        wholes = encode_all([context + continuation for context, continuation in moved])
    except RequestError:
        _name_the_first_refused(moved, encode_all, where)
        raise
    pairs = []
    for (context, _), whole, place in zip(moved, wholes, where, strict=True):
        before = list(map(int, ids[context]))
        after = list(map(int, whole[len(before) :]))
        check_continuation(after, context_length, place)
        pairs.append((before, after))
    return pairs


def check_continuation(ids: Ids, context_length: int, where: str) -> None:
    """Refuses a continuation that leaves nothing to score, or that no window of the model holds."""
    if not ids:
        raise RequestError(f"{where}: the tokenizer leaves no token to score after the context")
    if len(ids) > context_length:
        raise RequestError(
            f"{where}: {len(ids)} tokens are to be scored at once, more than the model's context of {context_length}"
        )


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _name_the_first_refused(texts: Sequence[tuple[str, str]], encode_all: EncodeAll, where: Sequence[str]) -> None:
    for (context, continuation), place in zip(texts, where, strict=True):
        try:
            encode_all([context + continuation])
        except RequestError as error:
            raise RequestError(f"{place}: {error}") from None
