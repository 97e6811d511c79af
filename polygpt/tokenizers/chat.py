"""Chat templates: the Jinja that lays out a message as the model was trained on it, run in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from polygpt.errors import RequestError
from polygpt.tokenizers.tokenizer import Tokenizer
from polygpt.tokenizers.typed import mark_tokens

_FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError)
_FAILURES += (RecursionError, TypeError, ValueError)
LIMIT = 100_000  # far more than a template that lays out a message needs


def chat_tokens(tokenizer: Tokenizer, template: str, prompt: str) -> list[int]:
    """The ids that a model continues as its answer to a user's message.

    Special tokens of the template count; those that the user typed are ordinary text.

    Args:
        tokenizer: its roles (`bos_token`, ...) are variables of the template.
        template: as tokenizer_config.json or a GGUF file has it.
        prompt: the user's message.

    Raises:
        RequestError: as `render_chat`.
    """
    names = {number: token for token, number in tokenizer.special_tokens.items()}
    guesses = {"bos_token": names.get((*tokenizer.start, None)[0]), "eos_token": names.get(tokenizer.end_of_text)}
    variables = tokenizer.roles or {name: token for name, token in guesses.items() if token is not None}
    text = render_chat(template, mark_tokens(prompt, tokenizer.special_tokens), variables)
    return tokenizer.encode_marked(text)


def render_chat(template: str, prompt: str, variables: Mapping[str, str] | None = None) -> str:
    """The text that a model continues as its answer to the message `prompt` of a user.

    Args:
        template: as tokenizer_config.json or a GGUF file has it.
        prompt: the message.
        variables: more variables of the template, such as `bos_token`; others are undefined.

    Raises:
        RequestError: the template is not Jinja, fails, or uses what the sandbox forbids.
    """

    def refuse(message: str) -> NoReturn:
        raise RequestError(f"the chat template refuses this: {message}")

    extensions = ["jinja2.ext.loopcontrols", _Generation]
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals |= {"raise_exception": refuse, "strftime_now": _now, "range": environment.counted_range}
    environment.filters["tojson"] = _to_json
    known = {"add_generation_prompt": True, "tools": None, "documents": None, **(variables or {})}
    try:
        return environment.from_string(template).render(messages=[{"role": "user", "content": prompt}], **known)
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
