"""Errors as OpenAI's API words them: a status and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from typing import Any

from polygpt.errors import PolygptError, RequestError

logger = logging.getLogger("polygpt.server")


class ApiError(Exception):
    """An error as the client sees it: the message contains no path and no traceback."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The JSON that a client gets."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong."""
    return ApiError(400, message, param=param, code=code)


def too_long(tokens: int, context: int, param: str, *, at_least: bool = False) -> ApiError:
    """The prompt exceeds the context."""
    count = f"at least {tokens:,}" if at_least else f"{tokens:,}"
    message = f"the prompt has {count} tokens, but the model's context holds {context:,}: shorten it"
    return ApiError(400, message, param=param, code="context_length_exceeded")


def unavailable(message: str, code: str, seconds: int = 5) -> ApiError:
    """The server cannot answer now."""
    return ApiError(503, message, code=code, headers={"retry-after": str(seconds)})


def failed() -> ApiError:
    """An internal error (500); the log has the details."""
    return ApiError(500, "the server failed to answer this request; its log says why", code="internal_error")


def as_api_error(error: Exception) -> ApiError:
    """Any exception as an `ApiError`; an unexpected one is logged, and the client sees a plain 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return invalid(str(error))
    if isinstance(error, PolygptError):
        return ApiError(500, str(error), code="model_failed")
    logger.error("a request failed", exc_info=error)
    return failed()
