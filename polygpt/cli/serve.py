"""`polygpt serve`."""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from polygpt.cli.output import Whole, dtype_option, json_option, print_json, reading, reading_draft, weights_option

if TYPE_CHECKING:
    from polygpt.server import Served, ServerSettings

PACKAGES = ("prometheus_client", "starlette", "uvicorn")
MISSING = "serving needs the extra 'serve': pip install 'polygpt[serve]'"
SHORTEST_KEY = 16  # characters; a shorter one could be guessed


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="MODEL [MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="One that is not loopback needs --api-key-file.")
@click.option("--port", type=Whole(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--slots", type=Whole(1), default=8, show_default=True, help="Sequences decoded together.")
@click.option("--queue", type=Whole(0), default=64, show_default=True, help="Sequences that may wait.")
@click.option("--length", type=Whole(2), help="Tokens of a sequence at most.  [default: the context length]")
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file of API keys, one a line, one of which every request must bring.",
)
@click.option("--draft", help="Guess tokens: 'lookup' in the text so far, or a smaller MODEL with the same tokenizer.")
@click.option("--served-name", "public", multiple=True, help="The name clients use; one for each MODEL, in order.")
@click.option("--origin", "origins", multiple=True, help="A web origin whose pages may call the API (CORS).")
@click.option("--deadline", "deadline_seconds", type=float, default=600.0, show_default=True, help="Seconds a request.")
@click.option(
    "--shutdown-seconds", type=float, default=30.0, show_default=True, help="Given to running requests at SIGTERM."
)
@click.option("--limit", "limits", multiple=True, metavar="NAME=VALUE", help="Any other limit, such as max_n=4.")
@dtype_option
@weights_option
@json_option
def serve(
    names: tuple[str, ...],
    api_key_file: Path | None,
    public: tuple[str, ...],
    limits: tuple[str, ...],
    draft: str | None,
    dtype: str | None,
    weights: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Serve models over an OpenAI-compatible HTTP API, with a page to try them at /.

    polygpt serve runs/notes --slots 8 --port 8000

    Two models are served side by side, so that the page can compare them. SIGTERM stops taking requests, lets those
    that run finish, and exits with 0.
    """
    keys = () if api_key_file is None else _read_keys(api_key_file)
    if not all(find_spec(package) for package in PACKAGES):
        raise click.ClickException(MISSING)
    from polygpt.config import parse_overrides, validate
    from polygpt.server import Served, ServerSettings, listen

    given = {name: value for name, value in settings.items() if value is not None}
    chosen = validate(ServerSettings, given | parse_overrides(limits))
    chosen.check(keys)
    names_of = _public_names(names, public)
    listening = listen(chosen)
    how = {"weights": weights or "auto", "for_text": True}
    drafting = draft if draft in (None, "lookup") else reading_draft(draft, dtype, **how)
    models = [
        Served(name, reading(model, dtype, {}, **how), chosen, drafting)
        for model, name in zip(names, names_of, strict=True)
    ]
    _run(models, chosen, keys, listening, as_json)


def _run(models: list[Served], settings: ServerSettings, keys: tuple[str, ...], listening: Any, as_json: bool) -> None:
    from polygpt.server import address_of, serve

    click.echo("compiling …", err=True)
    for served in models:
        served.runner.compile()
    address, names = address_of(listening), [served.name for served in models]

    def on_start() -> None:
        if as_json:
            print_json({"url": address, "models": names})
        else:
            click.echo(f"serving {' and '.join(names)} at {address}  (API: {address}/v1)", err=True)
        sys.stdout.flush()

    number = serve(models, settings, keys, listening, on_start)
    if not all(served.close(1.0) for served in models):  # a program of XLA's still runs, and cannot be ended
        sys.stderr.flush()
        os._exit(0 if number == signal.SIGTERM else 130)
    if number == signal.SIGINT:
        raise KeyboardInterrupt


def _read_keys(path: Path) -> tuple[str, ...]:
    from polygpt.errors import RequestError

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise RequestError(f"{path}: not UTF-8 text; one API key a line is needed") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise RequestError(f"{path}: there is no API key in it; one a line is needed")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
            raise RequestError(f"{path}: key {number} must be at least {SHORTEST_KEY} printable ASCII characters")
    return keys


def _public_names(models: tuple[str, ...], given: tuple[str, ...]) -> tuple[str, ...]:
    """What clients call the models: the last step of each path, unless other names are given."""
    if given and len(given) != len(models):
        raise click.UsageError(f"--served-name is needed once for each MODEL: {len(given)} for {len(models)}")
    names = given or tuple(Path(model).name.removesuffix(".gguf") or "model" for model in models)
    if len(set(names)) < len(names):
        raise click.UsageError(f"two models have the name '{names[0]}': give --served-name for each")
    if not all(name.isprintable() and 0 < len(name) <= 100 for name in names):
        raise click.UsageError("a served name must be 1 to 100 printable characters")
    return names
