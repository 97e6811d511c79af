"""`polygpt demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from polygpt.cli.output import json_option, overrides_argument, print_json, print_result
from polygpt.cli.settings import SettingsCommand, check_settings
from polygpt.process import command_line


@click.command(cls=SettingsCommand)
@overrides_argument
@click.option(
    "--out", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/demo, or runs/demo-2, ...]"
)
@click.option(
    "--short", is_flag=True, help="Run every stage in seconds, to check an installation; the results mean nothing."
)
@json_option
def demo(overrides: tuple[str, ...], out: Path | None, short: bool, as_json: bool) -> None:
    """Train a small GPT on Python's own documentation and sources, and compare it with three baselines."""
    from polygpt.config import dotted_to_nested, parse_overrides

    changes = parse_overrides(overrides)
    check_settings(dotted_to_nested(changes))

    from polygpt.demo import run_demo
    from polygpt.training.listeners import standard_listeners

    result = run_demo(out, changes, short=short, listeners=standard_listeners())
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    print_result(
        [
            ("this model", f"{result.val_bits_per_byte:.4f} bits per byte of the held-out text"),
            ("bigram", f"{result.bigram_bits_per_byte:.4f}"),
            ("gzip -9", f"{result.gzip_bits_per_byte:.4f}"),
            ("xz -9", f"{result.xz_bits_per_byte:.4f}"),
            ("speed", f"{result.tokens_per_second:,.0f} tokens/s, {result.seconds:.0f} s in all"),
            ("report", result.report),
            ("next", command_line("generate", result.run, "--prompt", "def main(")),
        ]
    )
