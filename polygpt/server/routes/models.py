"""`/v1/models` and `/v1/settings`: what is served, and within which limits."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from polygpt.server.inspection import inspection_limits
from polygpt.server.schemas import MOST_LOGPROBS
from polygpt.server.served import Served
from polygpt.server.state import ServerState, state_of

LIMITS = (
    "slots",
    "queue",
    "body_limit",
    "max_n",
    "max_prompts",
    "max_stops",
    "max_beams",
    "json_depth",
    "deadline_seconds",
)


async def models(request: Request) -> JSONResponse:
    """The models by their served names."""
    state = state_of(request)
    return JSONResponse({"object": "list", "data": [_entry(state, name) for name in state.models]})


async def model(request: Request) -> JSONResponse:
    """One model."""
    state = state_of(request)
    return JSONResponse(_entry(state, state.model(request.path_params["name"]).name))


async def settings(request: Request) -> JSONResponse:
    """The limits of the server, and what the page needs to know of each model."""
    state = state_of(request)
    limits = {name: getattr(state.settings, name) for name in LIMITS} | {"max_logprobs": MOST_LOGPROBS}
    return JSONResponse({"limits": limits, "models": [_facts(served) for served in state.models.values()]})


def _facts(served: Served) -> dict[str, Any]:
    return served.facts() | {"inspect": inspection_limits(served)}


def _entry(state: ServerState, name: str) -> dict[str, Any]:
    length = state.models[name].length
    return {"id": name, "object": "model", "created": state.created, "owned_by": "polygpt", "max_model_len": length}
