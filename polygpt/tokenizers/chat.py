"""Chat templates: the Jinja that lays out messages as the model was trained on them, run in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from polygpt.errors import RequestError
from polygpt.tokenizers.tokenizer import Tokenizer
from polygpt.tokenizers.typed import mark_tokens, unmark

_FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError)
_FAILURES += (RecursionError, TypeError, ValueError)
_KEYS = ("role", "content")
LIMIT = 100_000  # far more than a template that lays out a message needs


# A message has a `role` (`system`, `user`, `assistant`, ...) and `content`, its text; an assistant's
# may have `tool_calls` instead.
Messages = Sequence[Mapping[str, Any]]
# What a model may call: objects as transformers' `apply_chat_template` takes them.
Tools = Sequence[Mapping[str, Any]]


def chat_tokens(
    tokenizer: Tokenizer, template: str, messages: str | Messages, tools: Tools = (), most: int | None = None
) -> list[int]:
    """The ids that a model continues as its answer to `messages`, or to a single message of a user.

    Special tokens of the template count; those typed in a message or a tool, whoever's it is, are ordinary text.

    Args:
        tokenizer: its roles (`bos_token`, ...) are variables of the template.
        template: as tokenizer_config.json or a GGUF file has it.
        messages: the conversation, the oldest first.
        tools: what the template is to offer; it must know `tools`.
        most: refuse a conversation that must have more tokens, before it is tokenized (`Tokenizer.check_length`).

    Raises:
        RequestError: as `render_chat`; `TooLong` for more than `most` tokens.
    """
    names = {number: token for token, number in tokenizer.special_tokens.items()}
    guesses = {"bos_token": names.get((*tokenizer.start, None)[0]), "eos_token": names.get(tokenizer.end_of_text)}
    variables = tokenizer.roles or {name: token for name, token in guesses.items() if token is not None}
    special = tokenizer.special_tokens
    marked = [_marked(message, special) | {"role": message["role"]} for message in _as_messages(messages)]
    offered = {"tools": _marked(list(tools), special)} if tools else {}
    text = render_chat(template, marked, {**variables, **offered})
    tokenizer.check_length(unmark(text), most, special=True)
    return tokenizer.encode_marked(text)


def _marked(value: Any, tokens: Mapping[str, int]) -> Any:
    """`value` with the special tokens in all its texts marked as typed."""
    if isinstance(value, str):
        return mark_tokens(value, tokens)
    if isinstance(value, Mapping):
        return {mark_tokens(name, tokens): _marked(inner, tokens) for name, inner in value.items()}
    return [_marked(inner, tokens) for inner in value] if isinstance(value, list | tuple) else value


def _as_messages(given: str | Messages) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list | tuple) or not given:
        raise RequestError("a conversation is a list of messages, each with a role and its content")
    for number, message in enumerate(given):
        calls = isinstance(message, Mapping) and message.get("tool_calls")
        needed = ("role",) if calls else _KEYS
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in needed):
            raise RequestError(f"message {number} is {message!r:.60}: it needs a role and its content, both text")
    return [dict(message) for message in given]


def render_chat(template: str, messages: str | Messages, variables: Mapping[str, Any] | None = None) -> str:
    """The text that a model continues as its answer to `messages`, or to a single message of a user.

    Args:
        template: as tokenizer_config.json or a GGUF file has it.
        messages: the conversation, the oldest first.
        variables: more variables of the template, such as `bos_token`; others are undefined.

    Raises:
        RequestError: the messages are none, or the template is not Jinja, fails, refuses them, or uses what the
            sandbox forbids.
    """
    conversation = _as_messages(messages)

    def refuse(message: str) -> NoReturn:
        raise RequestError(f"the chat template refuses this: {message}")

    extensions = ["jinja2.ext.loopcontrols", _Generation]
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals |= {"raise_exception": refuse, "strftime_now": _now, "range": environment.counted_range}
    environment.filters["tojson"] = _to_json
    known = {"add_generation_prompt": True, "tools": None, "documents": None, **(variables or {})}
    try:
        return environment.from_string(template).render(messages=conversation, **known)
    except RequestError:
        raise
    # A template is a program: besides Jinja's own errors it may divide by zero, or nest too deep.
    except _FAILURES as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"the model's chat template cannot be used ({reason}); generate without --chat") from None


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks what the model itself says, and changes nothing here."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter sorts keys and escapes HTML; templates are written for transformers', which does neither.
    if isinstance(indent, int) and indent > LIMIT:
        raise SecurityError(f"an indent of {indent} is too large")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits on the size of products and powers, and on the total length of ranges."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.left = LIMIT

    def counted_range(self, *bounds: int) -> range:
        """`range`; all calls of a template share one limit, so that nested loops count."""
        numbers = range(*bounds)
        self.left -= len(numbers)
        if self.left < 0:
            raise SecurityError(f"its ranges have more than {LIMIT:,} numbers")
        return numbers

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        lengths = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
        numbers = [abs(value) for value in (left, right) if isinstance(value, int | float)]
        too_long = lengths and numbers and lengths[0] * numbers[0] > LIMIT
        if too_long or max(numbers, default=0) > 1e15 or (operator == "**" and right > 64):
            raise SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
