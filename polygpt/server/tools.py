"""Tool calls: how a model writes them, as its chat template shows, and the calls that are read from its text."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from polygpt.server.schemas import Tool

# llguidance then allows only the blanks that models put in JSON themselves.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class ToolFormat(NamedTuple):
    """How a template writes a call: JSON with `name` and `arguments` between `begin` and `end`.

    Without `begin` a whole text that is a JSON object is a call; without `end` a call, or a list of them, goes to the
    end of the text.
    """

    begin: str
    end: str
    arguments: str


class Call(NamedTuple):
    """One call; `arguments` is JSON."""

    name: str
    arguments: str

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI's API gives it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def format_of(template: str) -> ToolFormat:
    """The format that a chat template uses: Hermes' and Qwen's tags, Mistral's list, or Llama 3's plain JSON."""
    if "<tool_call>" in template:
        return ToolFormat("<tool_call>", "</tool_call>", "arguments")
    if "[TOOL_CALLS]" in template:
        return ToolFormat("[TOOL_CALLS]", "", "arguments")
    return ToolFormat("", "", "parameters" if '"parameters"' in template else "arguments")


def forced_grammar(tools: Sequence[Tool], style: ToolFormat) -> str:
    """A grammar, in Lark's notation, of exactly one call of one of `tools`."""
    calls = []
    for tool in tools:
        parameters = tool.function.parameters or {"type": "object"}
        properties = {"name": {"const": tool.function.name}, style.arguments: parameters}
        required = list(properties)
        call = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        calls.append(call)
    schema = json.dumps({"anyOf": calls, "x-guidance": _COMPACT})
    if not style.end:
        return f"start: call\ncall: %json {schema}"
    return f'start: "{style.begin}\\n" call "\\n{style.end}"\ncall: %json {schema}'


def read_calls(text: str, style: ToolFormat) -> list[Call] | None:
    """The calls that `text`, JSON without marks around it, makes; None if it is something else."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # also half a surrogate pair or NaN, which no answer may hold
        return None
    calls = [_call(item, style) for item in (value if isinstance(value, list) else [value])]
    return calls if calls and all(call is not None for call in calls) else None


def _call(value: Any, style: ToolFormat) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get(style.arguments, value.get("arguments", {}))
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(value["name"], arguments)


@dataclass
class Read:
    """A piece of text, classified: plain text or a tool call."""

    text: str
    calls: list[Call]


class CallReader:
    """Splits a continuation into text and tool calls while it streams.

    Text that may yet become a call is held back. What looks like a call and is none is given as text.
    """

    def __init__(self, style: ToolFormat):
        self.style = style
        self._held, self._inside = "", False

    def feed(self, text: str, last: bool = False) -> Read:
        """Adds a piece; `last` releases everything that is held back."""
        self._held += text
        found = Read("", [])
        while self._step(found, last):
            pass
        return found

    def _step(self, found: Read, last: bool) -> bool:
        """Moves on by one mark; whether there may be more."""
        style = self.style
        if not style.begin:
            return self._plain(found, last)
        if not self._inside:
            before, mark, after = self._held.partition(style.begin)
            keep = 0 if mark or last else _overlap(before, style.begin)
            found.text += before[: len(before) - keep]
            self._held, self._inside = (after, True) if mark else (before[len(before) - keep :], False)
            return bool(mark)
        inner, mark, after = self._held.partition(style.end) if style.end else (self._held, "", "")
        if not mark and not last:
            return False
        calls = read_calls(inner, style)
        if calls is None:
            found.text += style.begin + inner + mark
        else:
            found.calls += calls
        self._held, self._inside = after.lstrip("\n"), False
        return bool(self._held)

    def _plain(self, found: Read, last: bool) -> bool:
        """The whole text is a call, or it is text."""
        if self._inside or not self._held.lstrip()[:1] or self._held.lstrip()[0] not in "{[":
            if self._held.strip() or last or self._inside:  # leading blanks do not decide
                found.text += self._held
                self._held, self._inside = "", True
        elif last:
            calls = read_calls(self._held, self.style)
            found.text, found.calls = (self._held, []) if calls is None else ("", calls)
            self._held = ""
        return False


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
