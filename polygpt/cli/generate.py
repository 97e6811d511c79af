"""`polygpt generate`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from polygpt.cli.output import (
    Whole,
    as_typed,
    check_sampler,
    dtype_option,
    json_option,
    mesh_argument,
    mesh_of,
    print_json,
    reading,
    reading_draft,
    sampling_options,
    text_of,
    weights_option,
)
from polygpt.errors import PolygptError, RequestError
from polygpt.files import expand
from polygpt.hub import PREFIX as HUB

if TYPE_CHECKING:
    from polygpt.language_model import Generation, LanguageModel


SAMPLING = ("temperature", "top_p", "min_p", "seed")
ASKED_FOR = ("logprobs", "top_logprobs", "acceptance")
NOT_IN_A_BATCH = ("n", "beams", "length_penalty", "past_context")
# Lines of a batch that are named if they failed; the others are counted.
NAMED = 10


@click.command()
@click.argument("model", metavar="MODEL")
@mesh_argument
@click.option(
    "--prompt",
    "texts",
    multiple=True,
    help="The text to continue; - reads standard input. If given several times, each text is continued.",
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='A file of JSON lines such as {"prompt": "Once"}; a line may have an "id" and its own settings ("seed", ...).',
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="With --prompts: the file that gets a line for each prompt."
)
@click.option("--max-new-tokens", type=int, default=100, show_default=True, help="Maximum tokens per prompt.")
@sampling_options
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Divides the logits of tokens that occurred before (prompt included); above 1 makes them less likely.",
)
@click.option(
    "--presence-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Subtracted from the logit of every token generated so far.",
)
@click.option(
    "--frequency-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Subtracted from the logit of every token generated so far, once for each time it was generated.",
)
@click.option(
    "--no-repeat-ngram",
    type=int,
    default=0,
    show_default=True,
    help="Do not repeat any sequence of this many tokens; 0 allows it.",
)
@click.option("--min-new-tokens", type=int, default=0, show_default=True, help="Do not stop before this many tokens.")
@click.option(
    "--n",
    type=Whole(1),
    help="Generate this many samples of each prompt, with seeds SEED, SEED + 1, ...; with --beams the N best texts.",
)
@click.option(
    "--logprobs",
    type=Whole(0, 20),
    help="With --json or --prompts: give the log probability of each token, and those of this many (0 to 20) of the "
    "likeliest tokens at its place.",
)
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--beams", type=int, help="Search for the likeliest text with this many beams instead of sampling.")
@click.option(
    "--length-penalty",
    type=float,
    help="With --beams: above 0 favours long texts, below 0 short ones.  [default: 1.0]",
)
@click.option(
    "--schema",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="A file with a JSON schema that the text must match.",
)
@click.option("--regex", help="A regular expression that the whole text must match.")
@click.option(
    "--draft",
    metavar="MODEL|lookup",
    help="Draft tokens with a smaller MODEL, or by looking them up in the text so far, and check several at once: the "
    "same text, faster.",
)
@click.option(
    "--past-context", is_flag=True, help="Continue past the context length; attention then sees a sliding window."
)
@click.option(
    "--chat", is_flag=True, help="Treat the prompt as a message, and lay it out by the model's chat template."
)
@dtype_option
@weights_option
@json_option
def generate(
    model: str,
    mesh: tuple[str, ...],
    texts: tuple[str, ...],
    prompts: Path | None,
    out: Path | None,
    dtype: str | None,
    weights: str | None,
    as_json: bool,
    **settings,
) -> None:
    """Continue a prompt, several, or a file of them.

    The text of a single prompt streams to standard output as it is decoded. With several prompts the texts are printed
    when all are done, an empty line between two; --json prints a line for each. A prompt's text does not depend on the
    others.

    --prompts FILE --out FILE continues every prompt of a file, and writes a JSON line for each in their order. If it is
    interrupted, the same command continues it: the lines that are there are kept.

    MODEL is a run's folder, an imported or a Hugging Face folder, hf:owner/name, a .gguf file, or a preset. (A preset
    has random weights and no tokenizer, so it only takes --prompts with prompts of token ids.) mesh.tensor=4 splits the
    model over four devices.
    """
    settings = _chosen(settings)
    _check_options(texts, prompts, out, settings)
    if "schema" in settings:
        settings["schema"] = _schema(settings["schema"])
    for name, given in (("--stop", settings["stop"]), ("--regex", [settings.get("regex", "")])):
        for text in given:
            as_typed(text, name)
    if "logprobs" in settings and not (as_json or prompts):
        raise click.UsageError("--logprobs goes with --json or --prompts")
    if "length_penalty" in settings and "beams" not in settings:
        raise click.UsageError("--length-penalty goes with --beams N, which searches instead of sampling")
    check_sampler(model, settings)
    texts = [_standard_input() if text == "-" else as_typed(text, "--prompt") for text in texts]
    rows = max(len(texts), 1) * settings.get("n", 1)
    # A batch may have prompts of token ids alone.
    how = {"weights": weights or "auto", "for_text": prompts is None}
    lm = reading(model, dtype, {}, **how, mesh=mesh_of(mesh, rows))
    if settings.get("draft", "lookup") != "lookup":
        settings["draft"] = reading_draft(settings["draft"], dtype, **how)
    if prompts is not None:
        _batch(lm, f"{_identity(model)} {dtype} {weights}", prompts, out, settings, as_json)
    elif len(texts) == 1 and not as_json and not settings.keys() & {"n", "beams"}:
        _stream(lm, texts[0], settings)
    else:
        _show_all(lm, texts, settings, as_json)


def _check_options(texts: Sequence[str], prompts: Path | None, out: Path | None, settings: dict) -> None:
    if prompts is None:
        if out is not None:
            raise click.UsageError("--out goes with --prompts")
        if not texts:
            raise click.MissingParameter(ctx=click.get_current_context(), param_hint="'--prompt'", param_type="option")
        return
    if out is None:
        raise click.UsageError("--prompts goes with --out FILE, which gets a line for each prompt")
    if texts:
        raise click.UsageError("give --prompt or --prompts, not both")
    wrong = [name for name in NOT_IN_A_BATCH if name in settings]
    if wrong:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise click.UsageError(f"{options}: not with --prompts; give the prompts one by one, with --prompt")


def _batch(lm: LanguageModel, name: str, prompts: Path, out: Path, settings: dict, as_json: bool) -> None:
    from polygpt.cli.batch import run_batch
    from polygpt.sharding import use_mesh

    draft = lm.speculation(settings.pop("draft", None))
    with use_mesh(lm.scope):
        kept, added, tokens, failed = run_batch(lm, name, prompts, out, settings, draft)
    if as_json:
        print_json({"out": str(out), "kept": kept, "added": added, "tokens": tokens, "failed": list(failed)})
    else:
        click.echo(f"{out}: {added:,} lines added" + (f" to {kept:,}" if kept else ""), err=True)
    if failed:
        raise PolygptError(_failed(failed, kept + added, prompts, out))


def _failed(failed: Mapping[int, str], total: int, prompts: Path, out: Path) -> str:
    """Which lines of the input failed, the first with its reason."""
    number, reason = next(iter(failed.items()))
    named = ", ".join(map(str, list(failed)[:NAMED]))
    more = f" and {len(failed) - NAMED:,} more" if len(failed) > NAMED else ""
    lines = f"{prompts} line{'s' if len(failed) > 1 else ''} {named}{more}"
    told = f"{len(failed):,} of {total:,} prompts failed ({lines}); {out} has an error there instead of a text"
    return f"{told}\nline {number}: {reason}"


def _identity(model: str) -> str:
    """What a batch calls MODEL: the same for every way to write its path."""
    path = expand(model)
    return str(path.resolve()) if not model.startswith(HUB) and path.exists() else model


def _show_all(lm: LanguageModel, texts: Sequence[str], settings: dict, as_json: bool) -> None:
    several, shown = len(texts) > 1, 0
    for text, results in zip(texts, lm.generate(texts, **settings), strict=True):
        for result in results if isinstance(results, list) else [results]:
            if as_json:
                print_json(({"prompt": text} if several else {}) | _fields(result))
                continue
            if shown and "beams" not in settings:
                click.echo()
            shown += 1
            score = f"[{result.score:.4f}] " if "beams" in settings and "n" in settings else ""
            click.echo(score + ("" if settings["chat"] else text) + result.text)
            _report(lm, text, result, settings["chat"])


def _fields(result: Generation) -> dict:
    """The fields that `--json` prints: log probabilities and acceptance only if they were requested."""
    fields = dataclasses.asdict(result)
    return {key: value for key, value in fields.items() if value is not None or key not in ASKED_FOR}


def _chosen(settings: dict) -> dict:
    """The settings to call `generate` with; beam search takes those of sampling only where they were given."""
    chosen = {name: value for name, value in settings.items() if value is not None}
    if not chosen["past_context"]:
        del chosen["past_context"]
    if "beams" not in chosen:
        return chosen
    source = click.get_current_context().get_parameter_source
    default = click.core.ParameterSource.DEFAULT
    return {name: value for name, value in chosen.items() if name not in SAMPLING or source(name) != default}


def _stream(lm: LanguageModel, prompt: str, settings: dict) -> None:
    # The prompt is shown with the first piece of text: by then it is known to be in order.
    unseen = [] if settings["chat"] else [prompt]

    def show(piece: str) -> None:
        click.echo("".join(unseen) + piece, nl=False)
        sys.stdout.flush()
        unseen.clear()

    if sys.stderr.isatty():
        click.echo("reading the prompt; the first time this compiles a program …", err=True)
    result = lm.generate(prompt, on_text=show, **settings)
    show("\n")
    _report(lm, prompt, result, settings["chat"])


def _report(lm: LanguageModel, prompt: str, result: Generation, chat: bool) -> None:
    speed = "" if result.tokens_per_second is None else f" {result.tokens_per_second:,.0f} tokens/s,"
    whole, context = len(lm.prompt_tokens(prompt, chat)) + len(result.tokens), lm.config.context_length
    drafted = "" if result.acceptance is None else f" {result.acceptance:.0%} of the draft accepted,"
    past = f"; {whole - context} of them past the context_length of {context}" if whole > context else ""
    count = f"{len(result.tokens)} token" + ("" if len(result.tokens) == 1 else "s")
    click.echo(f"{count},{speed}{drafted} finished: {result.finish_reason}{past}", err=True)


def _schema(path: Path) -> str:
    if str(path) == "-":
        return _standard_input()
    try:
        return text_of(path.read_bytes(), f"--schema {path}").removeprefix("\ufeff")  # a byte order mark
    except OSError as error:
        raise RequestError(f"--schema {path}: cannot be read ({error.strerror})") from None


def _standard_input() -> str:
    return text_of(sys.stdin.buffer.read(), "standard input")
