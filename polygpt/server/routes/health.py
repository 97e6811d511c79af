"""`/health`, `/version` and `/metrics`."""

from __future__ import annotations

from importlib.metadata import version as installed

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from polygpt.server.metrics import CONTENT_TYPE
from polygpt.server.state import state_of


async def health(request: Request) -> JSONResponse:
    """200 while requests are taken and all engines work, else 503."""
    state = state_of(request)
    if state.draining:
        return JSONResponse({"status": "shutting down"}, 503)
    return JSONResponse(
        {"status": "ok"} if state.healthy else {"status": "engine failed"}, 200 if state.healthy else 503
    )


async def version(request: Request) -> JSONResponse:
    """The version of polygpt."""
    return JSONResponse({"version": installed("polygpt")})


async def metrics(request: Request) -> Response:
    """The counters, in Prometheus's text format."""
    return Response(state_of(request).metrics.text(), media_type=CONTENT_TYPE)
