"""What all routes of one server share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from polygpt.errors import suggest
from polygpt.server.errors import ApiError
from polygpt.server.metrics import Metrics
from polygpt.server.served import Served
from polygpt.server.settings import ServerSettings


@dataclass
class ServerState:
    """The models by name, the settings, the metrics, and whether the server is going down.

    `created` is the time that `/v1/models` tells; `active` requests are being answered.
    """

    models: dict[str, Served]
    settings: ServerSettings
    metrics: Metrics
    created: int
    draining: bool = False
    active: int = 0

    def model(self, name: str) -> Served:
        """The model with this name.

        Raises:
            ApiError: 404.
        """
        if name not in self.models:
            message = f"no model '{name:.100}'; {suggest(name[:100], self.models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.models[name]

    @property
    def healthy(self) -> bool:
        """Whether requests are taken and every engine works."""
        return not self.draining and all(served.runner.healthy for served in self.models.values())


@dataclass
class Facts:
    """What a route records about its request for the access log and the metrics."""

    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    outcome: str | None = None


def state_of(request: Request) -> ServerState:
    """The state of the server that takes this request."""
    return request.app.state.server


def facts_of(request: Request) -> Facts:
    """What the access log and the metrics record about this request."""
    return request.scope["polygpt.facts"]


def by_name(models: Sequence[Served]) -> dict[str, Served]:
    """The models by their names."""
    return {served.name: served for served in models}
