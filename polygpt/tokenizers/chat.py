"""Chat templates: Jinja that lays out messages as a model was trained on them, run where it can change nothing."""

from __future__ import annotations

import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from polygpt.errors import RequestError

_FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError)
_FAILURES += (RecursionError, TypeError, ValueError)
LIMIT = 100_000  # what no template that lays out a message comes near


def render_chat(template: str, prompt: str, start: str = "", end: str = "") -> str:
    """The text that a model continues as its answer to the message `prompt` of a user.

    Args:
        template: as tokenizer_config.json or a GGUF file gives it.
        prompt: the message.
        start: the start token's text.
        end: the end token's text.

    Raises:
        RequestError: the template is no Jinja, fails, or reaches for what a template has no business with.
    """

    def refuse(message: str) -> NoReturn:
        raise RequestError(f"the chat template refuses this: {message}")

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": refuse, "strftime_now": _now, "range": environment.counted_range}
    known: dict[str, Any] = {"bos_token": start, "eos_token": end, "add_generation_prompt": True, "tools": None}
    try:
        return environment.from_string(template).render(messages=[{"role": "user", "content": prompt}], **known)
    except RequestError:
        raise
    # A template is a program: besides Jinja's own errors it may divide by zero, or nest too deep.
    except _FAILURES as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"the model's chat template cannot be used ({reason}); leave chat out") from None


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which besides nothing becomes huge: neither products, nor powers, nor all ranges together."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.left = LIMIT

    def counted_range(self, *bounds: int) -> range:
        """`range`, of which all calls of a template share a limit: loops within loops count."""
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
            raise SecurityError(f"what {operator} gives is too large")
        return super().call_binop(context, operator, left, right)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
