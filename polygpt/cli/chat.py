"""`polygpt chat`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from polygpt.cli.output import dtype_option, reading, weights_option
from polygpt.errors import RequestError
from polygpt.files import expand, write_text

if TYPE_CHECKING:
    from polygpt.language_model import LanguageModel

COMMANDS = """/reset      forget the conversation
/save FILE  write the conversation to FILE, as JSON
/seed N     of the random numbers of the answers that follow
/help       this list
/quit       leave (so does Ctrl-D); Ctrl-C ends an answer"""


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--system", help="A system message, which comes before the conversation.")
@click.option("--max-new-tokens", type=int, default=512, show_default=True, help="Of an answer.")
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, help="Only the k likeliest tokens.")
@click.option("--top-p", type=float, default=0.95, show_default=True)
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@dtype_option
@weights_option
def chat(model: str, system: str | None, seed: int, dtype: str | None, weights: str | None, **settings) -> None:
    """Talk with a model; it needs a chat template. Lines are read from standard input: /help lists commands.

    MODEL is an imported or a Hugging Face folder, hf:owner/name, or a .gguf file.
    """
    lm = reading(model, dtype, {}, weights=weights or "auto", for_text=True)
    if lm.origin.chat_template is None:
        raise RequestError(
            f"{model} has no chat template, so it was not trained to talk; continue a text with: polygpt generate"
        )
    conversation = Conversation(lm, system, seed, settings)
    if sys.stdin.isatty():
        click.echo("/help lists commands; Ctrl-D leaves.", err=True)
    while (line := _read()) is not None:
        try:
            if line.strip() and not conversation.take(line):
                return
        except RequestError as error:
            click.echo(f"polygpt: {error}", err=True)


def _read() -> str | None:
    """The next line that is typed; None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            click.echo()
        except EOFError:
            click.echo()
            return None


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
        if not line.startswith("/"):
            self.answer(line)
            return True
        command, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if line.strip() == "/quit":
            return False
        if command == "/reset":
            self.messages = list(self.first)
        elif command == "/help":
            click.echo(COMMANDS)
        elif command == "/save" and argument:
            self.save(expand(argument))
        elif command == "/seed" and argument.isdecimal() and int(argument) < 2**32:
            self.seed = int(argument)
        else:
            raise RequestError(f"{line.strip():.60} is no command; there are\n{COMMANDS}")
        return True

    def save(self, path: Path) -> None:
        """Writes the messages as JSON.

        Raises:
            RequestError: the file cannot be written.
        """
        try:
            write_text(path, json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RequestError(f"{path}: cannot be written ({error.strerror})") from None

    def answer(self, line: str) -> None:
        """Streams the answer to a message; an interruption ends it, and what was said stays in the conversation."""
        messages = [*self.messages, {"role": "user", "content": line}]
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            click.echo(piece, nl=False)
            sys.stdout.flush()

        try:
            done = self.lm.chat(messages, seed=self.seed, on_text=show, **self.settings)
            if done.finish_reason == "context_length":
                click.echo("\n[the context is full: /reset starts anew]", nl=False, err=True)
        except KeyboardInterrupt:
            click.echo(" [interrupted]", nl=False, err=True)
        click.echo()
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
