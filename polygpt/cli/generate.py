"""`polygpt generate`."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

import click

from polygpt.cli.output import dtype_option, json_option, print_json, reading, weights_option

if TYPE_CHECKING:
    from polygpt.language_model import Generation, LanguageModel


SAMPLING = ("temperature", "top_p", "min_p", "seed")


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--prompt",
    "prompts",
    required=True,
    multiple=True,
    help="The text to continue; - reads standard input. Given several times, each is continued.",
)
@click.option("--max-new-tokens", type=int, default=100, show_default=True)
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, help="Only the k likeliest tokens.")
@click.option(
    "--top-p", type=float, default=0.95, show_default=True, help="Only the likeliest tokens up to this probability."
)
@click.option(
    "--min-p", type=float, default=0.0, show_default=True, help="Only tokens this share as likely as the likeliest."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--stop", multiple=True, help="End at this text; may be given several times.")
@click.option("--beams", type=int, help="Search for the likeliest text with so many beams, instead of sampling.")
@click.option("--n", type=int, help="With --beams: give the n best texts, the best first.")
@click.option("--length-penalty", type=float, help="With --beams: above 0 favours long texts, below 0 short ones.  [1]")
@click.option("--schema", type=click.File(encoding="utf-8"), help="A file with a JSON schema that the text must fit.")
@click.option("--regex", help="A regular expression that the whole text must match.")
@click.option("--chat", is_flag=True, help="The prompt is a message: lay it out by the model's chat template.")
@dtype_option
@weights_option
@json_option
def generate(
    model: str, prompts: tuple[str, ...], dtype: str | None, weights: str | None, as_json: bool, **settings
) -> None:
    """Continue a prompt; text streams to standard output as it is decoded.

    With several prompts each text is printed when all are done, and --json prints a line for each. A prompt's text does
    not depend on the others.

    MODEL is a run's folder, an imported or a Hugging Face folder, hf:owner/name, a .gguf file, or a preset (random
    weights, without text).
    """
    settings = _chosen(settings)
    if "schema" in settings:
        settings["schema"] = settings["schema"].read()
    texts = [_standard_input() if prompt == "-" else prompt for prompt in prompts]
    lm = reading(model, dtype, {}, weights=weights or "auto", for_text=True)
    if "beams" in settings:
        _search(lm, texts, settings, as_json)
        return
    if len(texts) == 1 and not as_json:
        _stream(lm, texts[0], settings)
        return
    results = lm.generate(texts, **settings)
    for text, result in zip(texts, results, strict=True):
        if as_json:
            print_json(({"prompt": text} if len(texts) > 1 else {}) | dataclasses.asdict(result))
        else:
            click.echo(("" if settings["chat"] else text) + result.text)
            _report(lm, text, result, settings["chat"])


def _chosen(settings: dict) -> dict:
    """The settings to call `generate` with; beam search takes those of sampling only where they were given."""
    chosen = {name: value for name, value in settings.items() if value is not None}
    if "beams" not in chosen:
        return chosen
    source = click.get_current_context().get_parameter_source
    default = click.core.ParameterSource.DEFAULT
    return {name: value for name, value in chosen.items() if name not in SAMPLING or source(name) != default}


def _search(lm: LanguageModel, texts: list[str], settings: dict, as_json: bool) -> None:
    """Prints what beam search finds: the text, or with --n each text below its score."""
    every = settings.pop("n", None)
    for text in texts:
        found = lm.generate(text, n=every or 1, **settings)
        shown = "" if settings["chat"] else text
        for result in found:
            if as_json:
                print_json(({"prompt": text} if len(texts) > 1 else {}) | dataclasses.asdict(result))
            else:
                click.echo(f"{f'[{result.score:.4f}] ' if every else ''}{shown}{result.text}")


def _stream(lm: LanguageModel, prompt: str, settings: dict) -> None:
    # The prompt is shown with the first piece of text: by then it is known to be in order.
    unseen = [] if settings["chat"] else [prompt]

    def show(piece: str) -> None:
        click.echo("".join(unseen) + piece, nl=False)
        sys.stdout.flush()
        unseen.clear()

    result = lm.generate(prompt, on_text=show, **settings)
    show("\n")
    _report(lm, prompt, result, settings["chat"])


def _report(lm: LanguageModel, prompt: str, result: Generation, chat: bool) -> None:
    speed = "" if result.tokens_per_second is None else f" {result.tokens_per_second:,.0f} tokens/s,"
    whole, context = len(lm.prompt_tokens(prompt, chat)) + len(result.tokens), lm.config.context_length
    past = f"; {whole - context} of them past the context_length of {context}" if whole > context else ""
    count = f"{len(result.tokens)} token" + ("" if len(result.tokens) == 1 else "s")
    click.echo(f"{count},{speed} finished: {result.finish_reason}{past}", err=True)


def _standard_input() -> str:
    from polygpt.errors import RequestError

    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input: not UTF-8 text (byte {error.start})") from None
