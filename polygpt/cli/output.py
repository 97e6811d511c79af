"""What commands share: `--json`, tables, and settings as `key=value`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

json_option: Callable = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on standard output, everything else on standard error."
)
overrides_argument: Callable = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def print_json(value: Any) -> None:
    """`value` as one line of JSON on standard output."""
    click.echo(json.dumps(value, allow_nan=False, ensure_ascii=False))


def print_table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """A table on standard output; `columns` are (heading, `left` or `right`)."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for heading, side in columns:
        table.add_column(heading, justify=side, no_wrap=side == "right")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    # A pipe has no width: rows must not be folded for a reader that is a program.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def print_result(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, aligned, on standard output."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")
