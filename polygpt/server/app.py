"""The application: routes, the page, errors and middleware put together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from polygpt.errors import RequestError
from polygpt.server.errors import ApiError, as_api_error
from polygpt.server.metrics import Metrics
from polygpt.server.middleware import BodyLimit, Guard, Observe
from polygpt.server.routes import ROUTES
from polygpt.server.served import Served
from polygpt.server.settings import ServerSettings
from polygpt.server.state import ServerState, by_name

_CORS = {"allow_methods": ["GET", "POST"], "allow_headers": ["authorization", "content-type"], "max_age": 600}
STATIC = Path(__file__).parent / "static"


def create_app(models: Sequence[Served], settings: ServerSettings, keys: Sequence[str] = ()) -> Starlette:
    """The ASGI application that serves `models`.

    Args:
        models: each under a name of its own.
        settings: the limits.
        keys: API keys, one of which a request must bring; none leaves the server open.

    Raises:
        RequestError: there are no models, two have one name, or strangers could call a server without keys.
    """
    settings.check(tuple(keys))
    names = [served.name for served in models]
    if not names or len(set(names)) < len(names):
        raise RequestError(f"each model needs a served name of its own, not {', '.join(names) or 'none'}")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for served in models:
            served.runner.start()
        yield
        for served in models:
            await asyncio.to_thread(served.close)

    state = ServerState(by_name(models), settings, Metrics(models), int(time.time()))
    routes = [*ROUTES, Route("/", _page)]
    around = [
        Middleware(Observe, state=state, routes=[route.path for route in routes]),
        *([Middleware(CORSMiddleware, **_CORS, allow_origins=settings.origins)] if settings.origins else []),
        Middleware(Guard, state=state, keys=keys),
        Middleware(BodyLimit, limit=settings.body_limit, seconds=settings.body_seconds),
    ]
    files = Mount("/static", StaticFiles(directory=STATIC))
    handlers = {ApiError: _api_error, HTTPException: _http_error}
    app = Starlette(routes=[*routes, files], middleware=around, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    app.state.server = state
    return app


async def _page(request: Request) -> FileResponse:
    return FileResponse(STATIC / "index.html")


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    told = as_api_error(error)
    return JSONResponse(told.body(), told.status, told.headers)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    path = request.url.path[:100]
    message = {404: f"there is no {path} here", 405: f"{path} does not take {request.method}"}.get(error.status_code)
    told = ApiError(error.status_code, message or error.detail)
    return JSONResponse(told.body(), told.status, error.headers)
