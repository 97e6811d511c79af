"""`polygpt data prepare` and `polygpt data list`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from polygpt.cli.output import Whole, json_option, print_json, print_result

if TYPE_CHECKING:
    from polygpt.data import Progress

LINE_SECONDS = 10.0


@contextmanager
def _progress_line() -> Iterator[Callable[[Progress], None]]:
    """Progress callback that keeps a line up to date on standard error; a new one now and then if it is no terminal."""
    terminal, shown = sys.stderr.isatty(), time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal shown
        if not terminal and time.monotonic() - shown < LINE_SECONDS:
            return
        shown = time.monotonic()
        rate = progress.new_tokens / max(progress.seconds, 1e-9)
        text = (
            f"{progress.parts} of {progress.of_parts} parts, {progress.documents:,} documents, "
            f"{progress.tokens:,} tokens ({rate:,.0f}/s)"
        )
        click.echo(f"\r{text}" if terminal else text, err=True, nl=not terminal)

    try:
        yield show
    finally:
        if terminal:
            click.echo(err=True)


@click.group()
def data() -> None:
    """Prepare token shards from text, and list data sets that have a name."""


@data.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the data sets that data.path can name. A file or folder of the same name has precedence."""
    from polygpt.data import DATASETS

    if as_json:
        print_json({name: dataset._asdict() for name, dataset in DATASETS.items()})
        return
    for name, dataset in DATASETS.items():
        column = f"column '{dataset.text_key}'" if dataset.text_key else "download by hand"
        click.echo(
            f"{name:18}{dataset.size}; {column}; splits: {dataset.splits}; {dataset.licence}; {dataset.reference}"
        )
        click.echo(f"{'':18}{dataset.where}")


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--tokenizer", "tokenizer_path", required=True, help="A tokenizer.json, its folder, or hf:owner/name.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder for the shards.")
@click.option("--split", type=click.Choice(["document", "fraction"]), default="document", show_default=True)
@click.option("--validation-fraction", type=float, default=0.05, show_default=True)
@click.option("--workers", type=Whole(1, 1024), default=1, show_default=True, help="Processes.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where they run: on this machine, or on the Ray cluster that RAY_ADDRESS names.",
)
@click.option(
    "--batch-chars",
    type=Whole(1 << 14),
    default=1 << 20,
    show_default=True,
    help="Characters that each process tokenizes at once: bounds its memory.",
)
@json_option
def prepare(sources: tuple[str, ...], tokenizer_path: str, out: Path, as_json: bool, **settings: Any) -> None:
    """Turn text (files, folders, globs, or `builtin`) into token shards, for data.path=OUT.

    The shards are the same for any number of workers. Parts that are done are kept in OUT.work until all are: the same
    command goes on after an interruption.
    """
    from polygpt.config import validate
    from polygpt.data import DataConfig, open_source, prepare_in_parallel
    from polygpt.tokenizers import load_tokenizer

    config = validate(DataConfig, {"path": list(sources), **settings})
    tokenizer = load_tokenizer(tokenizer_path)

    def note(text: str) -> None:
        click.echo(text, err=True)

    with _progress_line() as progress:
        shards = prepare_in_parallel(open_source(config), tokenizer, out, config, note=note, progress=progress)
    facts = {"path": str(out), "dtype": shards.manifest.dtype, "invalid_documents": shards.manifest.invalid_documents}
    for side in (shards.train, shards.validation):
        facts |= {f"{side.name}_{name}": getattr(side, name) for name in ("documents", "tokens", "bytes")}
    if as_json:
        print_json(facts)
    else:
        print_result((name, f"{value:,}" if isinstance(value, int) else value) for name, value in facts.items())
