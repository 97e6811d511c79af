"""`/v1/chat/completions`: the answer to a conversation."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from polygpt.generation import Part
from polygpt.server.answers import Answer, Continued, Form, finish_reason
from polygpt.server.bodies import read_body
from polygpt.server.errors import invalid
from polygpt.server.logprobs import chat_logprobs
from polygpt.server.messages import read_messages
from polygpt.server.sampling import check_count, constraint_of, works_of
from polygpt.server.schemas import ChatCompletion, Tool
from polygpt.server.served import Served
from polygpt.server.settings import ServerSettings
from polygpt.server.state import facts_of, state_of
from polygpt.server.tools import CallReader, ToolFormat, forced_grammar, format_of


async def chat(request: Request) -> Any:
    """Answers a conversation, with text or calls of tools."""
    state = state_of(request)
    body = await read_body(request, ChatCompletion, state.settings.json_depth)
    served = state.model(body.model)
    facts_of(request).model = served.name
    _check(body, served, state.settings)
    tools, forced = _choose_tools(body, served)
    style = format_of(served.lm.origin.chat_template or "") if tools else None
    prompt = await served.chat_ids(
        read_messages(body.messages), [tool.model_dump(exclude_unset=True) for tool in tools]
    )
    grammar = forced_grammar(tools, style) if forced else body.grammar
    constraint = await constraint_of(served, state.settings, schema=_schema(body), regex=body.regex, grammar=grammar)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    form = ChatForm(served, body, style)
    answer = Answer(request, served, body, form, [prompt])
    most = body.max_completion_tokens or body.max_tokens or served.length
    if body.beams is not None:
        return await answer.respond_with_beams(most)
    how = {"samples": body.n, "max_tokens": most, "logprobs": logprobs, "constraint": constraint}
    return await answer.respond(works_of(served, [prompt], body, state.settings, **how))


class ChatForm(Form):
    """The answers of `/v1/chat/completions`."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, served: Served, body: ChatCompletion, style: ToolFormat | None):
        self.served, self.body, self.style = served, body, style
        self.readers = [None if style is None else CallReader(style) for _ in range(body.n)]
        self.called = [0] * body.n

    def beginnings(self) -> list[dict[str, Any]]:
        """Whose turn it is."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self.body.n)]

    def deltas(self, index: int, part: Part) -> list[dict[str, Any]]:
        """Text, whole calls, and the reason of the end with the last of them."""
        last, reader = part.finish_reason is not None, self.readers[index]
        text, calls = part.text, []
        if reader is not None:
            read = reader.feed(part.text, last)
            text, calls = read.text, read.calls[: self._room(index)]
        delta: dict[str, Any] = {"content": text} if text or not calls else {}
        if calls:
            first = self.called[index]
            numbered = enumerate(calls, first)
            delta["tool_calls"] = [{"index": number, **call.to_dict()} for number, call in numbered]
            self.called[index] += len(calls)
        scores = self._logprobs(part.tokens, part.logprobs)
        if not (text or calls or last or scores):
            return []
        chunk = self._chunk(index, delta, self._reason(index, part.finish_reason), scores)
        if self.body.return_token_ids:
            chunk["token_ids"] = part.tokens
        return [chunk]

    def choices(self, sequences: list[Continued]) -> list[dict[str, Any]]:
        """The messages."""
        return [self._choice(index, sequence) for index, sequence in enumerate(sequences)]

    def _choice(self, index: int, done: Continued) -> dict[str, Any]:
        text, calls, reader = done.text, [], self.readers[index]
        if reader is not None:
            read = reader.feed(done.text, last=True)
            text, calls = read.text, read.calls[: self._room(index)]
        self.called[index] += len(calls)
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text.strip() else text}
        if calls:
            message["tool_calls"] = [call.to_dict() for call in calls]
        choice = {"index": index, "message": message | {"refusal": None}}
        choice["logprobs"] = self._logprobs(done.tokens, done.scores)
        choice["finish_reason"] = self._reason(index, done.finish_reason)
        return choice | ({"token_ids": done.tokens} if self.body.return_token_ids else {})

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _room(self, index: int) -> int | None:
        """How many calls may follow: one in all, unless calls in parallel are allowed."""
        return None if self.body.parallel_tool_calls else 1 - self.called[index]

    def _reason(self, index: int, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self.called[index] else finish_reason(reason)

    def _logprobs(self, tokens: list[int], scores: list[Any]) -> dict[str, Any] | None:
        if not self.body.logprobs or not tokens:
            return None
        content = chat_logprobs(self.served, tokens, scores, self.body.return_token_ids)
        return {"content": content, "refusal": None}


def _check(body: ChatCompletion, served: Served, settings: ServerSettings) -> None:
    check_count("n", body.n, settings.max_n)
    check_count("max_tokens", body.max_tokens, served.length)
    check_count("max_completion_tokens", body.max_completion_tokens, served.length)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid("give max_tokens or max_completion_tokens, not both", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs goes with logprobs: true", param="top_logprobs")


def _choose_tools(body: ChatCompletion, served: Served) -> tuple[list[Tool], bool]:
    """The tools that are offered, and whether one of them must be called."""
    choice = body.tool_choice or ("auto" if body.tools else "none")
    if isinstance(choice, dict):
        name = choice.get("function", {}).get("name") if isinstance(choice.get("function"), dict) else None
        tools = [tool for tool in body.tools if tool.function.name == name]
        if choice.get("type") != "function" or not tools:
            raise invalid(f"tool_choice: no tool is named {name!r:.80}", param="tool_choice")
    elif choice in ("none", "auto", "required"):
        tools = [] if choice == "none" else list(body.tools)
        if choice != "none" and not tools:
            raise invalid(f"tool_choice: '{choice}' needs tools", param="tool_choice")
    else:
        message = f"tool_choice: {choice!r:.40} is none of 'none', 'auto', 'required' and a named function"
        raise invalid(message, param="tool_choice")
    if tools and not served.knows_tools:
        raise invalid("tools: this model's chat template knows no tools", param="tools")
    constrained = body.regex is not None or body.grammar is not None or _schema(body) is not None
    if tools and constrained:
        raise invalid("a call of a tool cannot be constrained as well: give tool_choice 'none'", param="tool_choice")
    return tools, bool(tools) and choice != "auto"


def _schema(body: ChatCompletion) -> Any:
    """The schema that the answer must fit; None if there is none."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise invalid("response_format.json_schema: this key is required", param="response_format")
    return wanted.json_schema.schema_
