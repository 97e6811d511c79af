"""The routes: which function answers which path."""

from __future__ import annotations

from starlette.routing import Route

from polygpt.server.inspection import inspect
from polygpt.server.routes.completions import completions
from polygpt.server.routes.health import health, metrics, version
from polygpt.server.routes.models import model, models, settings

ROUTES = [
    Route("/health", health),
    Route("/version", version),
    Route("/metrics", metrics),
    Route("/v1/models", models),
    Route("/v1/models/{name}", model),
    Route("/v1/settings", settings),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/inspect", inspect, methods=["POST"]),
]

__all__ = ["ROUTES", "completions", "health", "metrics", "model", "models", "settings", "version"]
