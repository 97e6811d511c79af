"""`/v1/inspect`: what a model computes about a text, for the page: scores, attention, the logit lens, experts."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt
from starlette.requests import Request
from starlette.responses import JSONResponse

from polygpt.inspection import (
    TokenScores,
    attention_maps,
    expert_shares,
    logit_lens,
    pool_maps,
    score_tokens,
)
from polygpt.server.bodies import read_body
from polygpt.server.errors import ApiError, invalid
from polygpt.server.schemas import MOST_LOGPROBS, Named
from polygpt.server.served import Served
from polygpt.server.state import facts_of, state_of
from polygpt.server.streaming import unless_gone

MOST_TOKENS = 2048
# Bytes of all heads' maps together, of which the answer holds thumbnails or one layer.
MAP_BYTES = 2**27
LENS_POSITIONS = 64
THUMBNAIL = 32
# Experts named for each token and layer.
MOST_EXPERTS = 8


class Inspect(Named):
    """The body of `/v1/inspect`.

    Attributes:
        model: the served name.
        text: or `tokens`, what is inspected; a text begins with the tokenizer's start token, if there is one.
        what: which of the parts to compute.
        top: how many of the likeliest tokens to name at each position.
        layer: of the attention maps in full; without it every head of every layer is answered as a thumbnail.
        head: only this head of `layer`.
        start, count: the positions that the logit lens reads.
    """

    text: str | None = None
    tokens: list[NonNegativeInt] | None = None
    what: Annotated[list[Literal["scores", "attention", "logit_lens", "experts"]], Field(min_length=1)]
    top: Annotated[int, Field(ge=1, le=MOST_LOGPROBS)] = 10
    layer: NonNegativeInt | None = None
    head: NonNegativeInt | None = None
    start: NonNegativeInt = 0
    count: Annotated[PositiveInt, Field(le=LENS_POSITIONS)] = 32


def inspection_limits(served: Served) -> dict[str, int]:
    """What `/v1/settings` tells of a model: the longest texts that are inspected, in tokens."""
    heads = [getattr(layer.attention, "num_heads", 1) for layer in served.lm.config.layers]
    # Lengths are padded to a power of two, or to the context.
    longest = 2 ** int(math.log2(math.sqrt(MAP_BYTES / max(sum(heads), 1))))
    fits = served.length if sum(heads) * served.lm.config.context_length**2 <= MAP_BYTES else longest
    return {
        "tokens": min(served.length, MOST_TOKENS),
        "attention_tokens": min(served.length, MOST_TOKENS, fits),
        "lens_positions": LENS_POSITIONS,
    }


async def inspect(request: Request) -> JSONResponse:
    """Computes what is asked for, beside the engine; not at all if its client goes away before its turn comes."""
    state = state_of(request)
    body = await read_body(request, Inspect, state.settings.json_depth)
    served = state.model(body.model)
    facts_of(request).model = served.name
    ids = await _ids_of(body, served)
    facts_of(request).prompt_tokens = len(ids)
    _check(body, served, len(ids))
    computing = served.background.run(answer, served, ids, body)
    return JSONResponse(await unless_gone(computing, request.receive, state.settings.deadline_seconds))


async def _ids_of(body: Inspect, served: Served) -> list[int]:
    if (body.text is None) == (body.tokens is None):
        raise invalid("give either text or tokens", param="text")
    param = "text" if body.tokens is None else "tokens"
    ids = body.tokens if body.text is None else await served.text_ids(body.text)
    if not ids:
        raise invalid("there is nothing to inspect: the text is empty", param=param)
    served.check_ids(ids, "tokens")
    return ids


def _check(body: Inspect, served: Served, length: int) -> None:
    limits, layers = inspection_limits(served), served.lm.config.layers
    most = limits["attention_tokens" if "attention" in body.what else "tokens"]
    if length > most:
        asked = "attention maps are" if "attention" in body.what else "a text is"
        message = f"{asked} computed for at most {most:,} tokens, and this text has {length:,}: shorten it"
        raise ApiError(413, message, param="text" if body.tokens is None else "tokens", code="inspection_too_long")
    if body.layer is not None and body.layer >= len(layers):
        raise invalid(f"layer {body.layer} does not exist: the model has layers 0 to {len(layers) - 1}", param="layer")
    if body.head is not None:
        if body.layer is None:
            raise invalid("head goes with layer", param="head")
        heads = getattr(layers[body.layer].attention, "num_heads", 1)
        if body.head >= heads:
            raise invalid(f"head {body.head} does not exist: layer {body.layer} has 0 to {heads - 1}", param="head")
    if "logit_lens" in body.what and body.start >= length:
        raise invalid(f"start={body.start} is past the text's {length:,} tokens", param="start")


def answer(served: Served, ids: Sequence[int], body: Inspect) -> dict[str, Any]:
    """The JSON that answers a checked request."""
    lm = served.lm
    arguments = (lm.model, lm.params, ids)
    found: dict[str, Any] = {"model": served.name, "tokens": [_named(served, token) for token in ids]}
    if "scores" in body.what:
        _add_scores(found, served, score_tokens(*arguments, body.top))
    if "attention" in body.what:
        found["attention"] = _attention(attention_maps(*arguments), body)
    if "logit_lens" in body.what:
        count = min(body.count, len(ids) - body.start)
        rows = logit_lens(*arguments, body.start, count, body.top)
        found["logit_lens"] = {"start": body.start, "count": count, "layers": [_lens_row(served, row) for row in rows]}
    if "experts" in body.what:
        shares = expert_shares(*arguments)
        found["experts"] = {"layers": [None if layer is None else _experts(layer) for layer in shares]}
    return found


def _named(served: Served, token: int) -> dict[str, Any]:
    return {"id": int(token), "text": served.token_text(int(token))}


def _top(served: Served, tokens: np.ndarray, logprobs: np.ndarray) -> list[dict[str, Any]]:
    pairs = zip(tokens.tolist(), logprobs.tolist(), strict=True)
    return [{"id": token, "text": served.token_text(token), "logprob": round(value, 6)} for token, value in pairs]


def _add_scores(found: dict[str, Any], served: Served, scores: TokenScores) -> None:
    """To each token what was predicted in its place, and to the whole what comes `next`."""
    places = [
        {"entropy": round(float(scores.entropies[t]), 6), "top": _top(served, *top)}
        for t, top in enumerate(zip(scores.top_tokens, scores.top_logprobs, strict=True))
    ]
    found["tokens"][0] |= {"logprob": None, "rank": None, "entropy": None, "top": []}
    for token, place, logprob, rank in zip(
        found["tokens"][1:], places, scores.logprobs.tolist(), scores.ranks.tolist(), strict=False
    ):
        token |= {"logprob": round(logprob, 6), "rank": rank} | place
    found["next"] = places[-1]


def _attention(maps: list[np.ndarray | None], body: Inspect) -> dict[str, Any]:
    """Every head as a thumbnail, or one layer's heads in full; bytes [heads, size, size] in base64."""
    told: dict[str, Any] = {"encoding": "sqrt_uint8", "heads": [0 if layer is None else len(layer) for layer in maps]}
    if body.layer is None:
        small = [None if layer is None else pool_maps(layer, THUMBNAIL) for layer in maps]
        told["size"] = next((layer.shape[-1] for layer in small if layer is not None), 0)
        told["thumbnails"] = [None if layer is None else _base64(layer) for layer in small]
        return told
    full = maps[body.layer]
    if full is None:
        raise invalid(f"layer {body.layer} has no attention weights to show", param="layer")
    told |= {"layer": body.layer, "head": body.head, "size": full.shape[-1]}
    told["maps"] = _base64(full if body.head is None else full[body.head : body.head + 1])
    return told


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _lens_row(served: Served, row: Any) -> list[dict[str, Any]]:
    """What one layer would predict after each position."""
    places = zip(
        row.logprobs, row.ranks.tolist(), row.entropies.tolist(), row.top_tokens, row.top_logprobs, strict=True
    )
    return [
        {
            "logprob": None if np.isnan(logprob) else round(float(logprob), 6),
            "rank": None if rank < 0 else rank,
            "entropy": round(entropy, 6),
            "top": _top(served, tokens, values),
        }
        for logprob, rank, entropy, tokens, values in places
    ]


def _experts(shares: np.ndarray) -> dict[str, Any]:
    """One layer: how many experts there are, each one's mean share, and the largest of each token."""
    count = min(MOST_EXPERTS, shares.shape[1])
    best = np.argsort(-shares, axis=1, kind="stable")[:, :count]
    chosen = [
        [[int(expert), round(float(row[expert]), 5)] for expert in order if row[expert] > 0]
        for row, order in zip(shares, best, strict=True)
    ]
    return {"num_experts": shares.shape[1], "mean": [round(float(x), 5) for x in shares.mean(0)], "tokens": chosen}
