"""The log: a line of JSON for each request and each thing that went wrong, on standard error."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

ACCESS = logging.getLogger("polygpt.server.access")


def access(fields: dict[str, Any]) -> None:
    """Logs a request."""
    ACCESS.info("request", extra={"fields": fields})


class JsonLines(logging.Formatter):
    """A record as one line of JSON. Everything but printable ASCII is escaped, so no client can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = getattr(record, "fields", None)
        if fields is None:
            fields = {"level": record.levelname.lower(), "message": record.getMessage()}
            if record.exc_info:
                fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps({"time": time, **fields}, default=str)


def log_to_stderr() -> None:
    """Sends the server's log, and uvicorn's warnings, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("polygpt.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
