"""The messages of a conversation, as clients send them and as chat templates take them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

from pydantic import Field

from polygpt.config import Config
from polygpt.server.bodies import check_fields, parse_json
from polygpt.server.errors import ApiError, invalid
from polygpt.server.schemas import Nested

# Nesting of a call's arguments up to which they are read as JSON.
_DEEPEST_ARGUMENTS = 64


class CalledFunction(Nested):
    """The function of a call that the model made before; `arguments` is JSON."""

    name: str
    arguments: str = "{}"


class ToolCall(Nested):
    """A call that the model made before."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Config):
    """A part of a message's content."""

    type: str
    text: str = ""


class Message(Config):
    """One message. Fields that clients send back with an answer, and that mean nothing here, are accepted."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] = Field(default_factory=list)


def read_messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages for a chat template.

    Raises:
        ApiError: one is not a message of text.
    """
    if not given:
        raise invalid("messages: the list is empty; give at least one message", param="messages")
    return [_read(number, values) for number, values in enumerate(given)]


def _read(number: int, values: dict[str, Any]) -> dict[str, Any]:
    try:
        message = check_fields(Message, values)
    except ApiError as error:
        raise invalid(f"messages.{number}.{error.message}", param=f"messages.{number}") from None
    content = _text(message.content, f"messages.{number}.content")
    if content is None and not message.tool_calls:
        raise invalid(f"messages.{number}.content: text is needed", param=f"messages.{number}")
    read = {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
    if message.tool_calls:
        read["tool_calls"] = [_call(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            read[name] = getattr(message, name)
    return read


def _text(content: Any, where: str) -> str | None:
    """The text of a message, whose parts are joined."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise invalid(f"{where}: text or a list of parts is needed", param=where)
    parts = [check_fields(TextPart, part) if part.get("type") == "text" else part for part in content]
    other = next((part for part in parts if isinstance(part, dict)), None)
    if other is not None:
        raise invalid(f"{where}: a part of type {other.get('type')!r:.40} is not supported; give text", param=where)
    return "".join(part.text for part in parts)


def _call(call: ToolCall) -> dict[str, Any]:
    """A call with its arguments as an object, as templates want them; what is no JSON stays text."""
    arguments: Any = call.function.arguments
    with suppress(ApiError):
        arguments = parse_json(arguments.encode(), _DEEPEST_ARGUMENTS)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
