"""The routes: which function answers which path."""

from __future__ import annotations

from starlette.routing import Route

from polygpt.server.inspection import inspect
from polygpt.server.routes.chat import chat
from polygpt.server.routes.completions import completions
from polygpt.server.routes.health import health, metrics, version
from polygpt.server.routes.models import model, models, settings
from polygpt.server.routes.tokens import detokenize, tokenize

ROUTES = [
    Route("/health", health),
    Route("/version", version),
    Route("/metrics", metrics),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/v1/settings", settings),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/inspect", inspect, methods=["POST"]),
    Route("/v1/chat/completions", chat, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]

__all__ = [
    "ROUTES",
    "chat",
    "completions",
    "detokenize",
    "health",
    "metrics",
    "model",
    "models",
    "settings",
    "tokenize",
    "version",
]
