"""Chat templates: Jinja that lays out messages as a model was trained on them, run where it can change nothing."""

from __future__ import annotations

import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from polygpt.errors import RequestError


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

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": _now}
    known: dict[str, Any] = {"bos_token": start, "eos_token": end, "add_generation_prompt": True, "tools": None}
    try:
        return environment.from_string(template).render(messages=[{"role": "user", "content": prompt}], **known)
    except RequestError:
        raise
    # A template is a program: besides Jinja's own errors it may divide by zero, or nest too deep.
    except (jinja2.TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"the model's chat template cannot be used ({reason}); leave chat out") from None


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
