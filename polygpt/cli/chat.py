"""`polygpt chat`."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from polygpt.cli.output import (
    SEED,
    Whole,
    as_typed,
    check_sampler,
    dtype_option,
    reading,
    sampling_options,
    text_of,
    weights_option,
)
from polygpt.errors import RequestError, TooLong, suggest
from polygpt.files import expand, write_text

if TYPE_CHECKING:
    from polygpt.language_model import LanguageModel

COMMANDS = """/reset      forget the conversation
/save FILE  write the conversation to FILE, as JSON
/seed N     use seed N for the answers that follow
/help       show this list
/quit       leave (so does Ctrl-D); Ctrl-C ends an answer
//TEXT      send /TEXT as a message"""
NAMES = ("/reset", "/save", "/seed", "/help", "/quit")


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--system", help="A system message, which comes before the conversation.")
@click.option("--max-new-tokens", type=Whole(1), default=512, show_default=True, help="Maximum tokens per answer.")
@sampling_options
@dtype_option
@weights_option
@click.option("--json", is_flag=True, hidden=True, expose_value=False, callback=lambda *given: _refuse_json(given[2]))
def chat(model: str, system: str | None, seed: int, dtype: str | None, weights: str | None, **settings) -> None:
    """Talk with a model that has a chat template. Each line of standard input is a message; /help lists commands.

    MODEL is an imported or a Hugging Face folder, hf:owner/name, or a .gguf file.
    """
    check_sampler(model, settings)
    if system is not None:
        as_typed(system, "--system")
    lm = reading(model, dtype, {}, weights=weights or "auto", for_text=True)
    if lm.origin.chat_template is None:
        raise RequestError(
            f"{model} has no chat template, so it was not trained to talk; continue a text with: polygpt generate"
        )
    conversation = Conversation(lm, system, seed, settings)
    if sys.stdin.isatty():
        with suppress(ImportError):  # not on every system; `input` then edits lines and remembers them
            import readline  # noqa: F401
        click.echo("/help lists commands; Ctrl-D leaves.", err=True)
    while True:
        try:
            line = _read()
            if line is None or (line.strip() and not conversation.take(line)):
                return
        except RequestError as error:
            click.echo(f"polygpt: {error}", err=True)


def _refuse_json(given: bool) -> None:
    if given:
        raise click.UsageError(
            "chat has no --json: /save FILE writes the conversation as JSON; polygpt generate --chat --json answers a "
            "single message"
        )


def _read() -> str | None:
    """The next line that is typed; None at the end of the input.

    Raises:
        RequestError: it is not UTF-8; the next line can be read all the same.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline()
        return text_of(line, "this message").rstrip("\r\n") if line else None
    while True:
        try:
            return as_typed(input("> "), "this message")
        except KeyboardInterrupt:
            click.echo()
        except EOFError:
            click.echo()
            return None
        except UnicodeDecodeError:
            raise RequestError("this message: not UTF-8 text") from None


class Conversation:
    """The messages so far, and how the next one is answered."""

    def __init__(self, lm: LanguageModel, system: str | None, seed: int, settings: dict):
        self.lm, self.seed, self.settings = lm, seed, settings
        self.first = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.first)

    def take(self, line: str) -> bool:
        """Answers a message or obeys a command; whether the conversation goes on.

        Raises:
            RequestError: the line cannot be answered; the conversation is left as it was.
        """
        if not line.startswith("/") or line.startswith("//"):
            self.answer(line.removeprefix("/"))
            return True
        command, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if command not in NAMES:
            raise RequestError(
                f"{line.strip():.60} is no command: {suggest(command, NAMES)} (/help lists commands; //... sends /... "
                "as a message)"
            )
        if argument and command not in ("/save", "/seed"):
            raise RequestError(f"{command} takes no argument")
        if command == "/reset":
            self.messages = list(self.first)
            _confirm("the conversation is forgotten" + (", except for the system message" if self.first else ""))
        elif command == "/help":
            click.echo(COMMANDS)
        elif command == "/save":
            self.save(argument)
        elif command == "/seed":
            self.reseed(argument)
        return command != "/quit"

    def reseed(self, given: str) -> None:
        """Takes the seed that was typed.

        Raises:
            RequestError: it is no seed.
        """
        if not (given.isascii() and given.isdecimal() and len(given) < 20 and int(given) <= SEED.most):
            instead = f", not {given:.40}" if given else ", as in /seed 1"
            raise RequestError(f"/seed takes a whole number {SEED.described}{instead}")
        self.seed = int(given)
        _confirm(f"the answers that follow use seed {self.seed}")

    def save(self, name: str) -> None:
        """Writes the messages as JSON.

        Raises:
            RequestError: the file cannot be written, or there is no name.
        """
        if not name:
            raise RequestError("/save takes the name of a file: /save talk.json")
        path = expand(name)
        try:
            write_text(path, json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RequestError(f"{path}: cannot be written ({error.strerror})") from None
        count = len(self.messages)
        _confirm(f"{count} message{'' if count == 1 else 's'} written to {path}")

    def answer(self, line: str) -> None:
        """Streams the answer to a message.

        An interruption ends the answer, and what was said stays in the conversation. If nothing was said, the message
        is dropped as well.

        Raises:
            RequestError: the conversation is longer than the context.
        """
        messages = [*self.messages, {"role": "user", "content": line}]
        prompt = self._prompt(messages)
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            click.echo(piece, nl=False)
            sys.stdout.flush()

        cut, note = False, ""
        try:
            done = self.lm.generate(prompt, seed=self.seed, on_text=show, **self.settings)
            if done.finish_reason == "context_length":
                cut, note = True, "\n[the context is full: /reset starts anew]"
        except KeyboardInterrupt:
            cut, note = True, " [interrupted]"
        dropped = cut and not "".join(pieces)
        if note:
            click.echo(note + (" [the message is dropped]" if dropped else ""), nl=False, err=True)
        click.echo()
        if not dropped:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids that the answer continues."""
        context = self.lm.config.context_length
        try:
            ids = self.lm.chat_tokens(messages, most=context)
            tokens, least = len(ids), ""
        except TooLong as error:
            ids, tokens, least = [], error.tokens, "at least "
        if tokens > context:
            raise RequestError(
                f"the conversation would have {least}{tokens} tokens, and the model's context has {context}: /reset "
                "starts anew, or shorten the message"
            )
        return ids


def _confirm(what: str) -> None:
    click.echo(f"[{what}]", err=True)
