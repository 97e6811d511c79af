"""`polygpt show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from polygpt.cli.output import json_option, overrides_argument, print_json, print_result, print_tree


@click.command()
@click.argument("name", metavar="PRESET|RECIPE|FILE|RUN")
@overrides_argument
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write an interactive page of its parts here.")
@json_option
def show(name: str, overrides: tuple[str, ...], page: Path | None, as_json: bool) -> None:
    """The resolved configuration of a model, the tree of its parts, and what it costs.

    Settings are written as in a run: polygpt show gpt2 model.num_layers=4

    The page holds shapes alone, and of a run's folder (without settings) its weights.
    """
    from polygpt.config import parse_overrides, to_yaml
    from polygpt.files import new_file
    from polygpt.loading import load
    from polygpt.model import Model
    from polygpt.summary import model_page, model_tree, resolve_model, summary

    config, is_open = resolve_model(name, parse_overrides(overrides))
    facts = summary(config)
    if page is not None:
        with new_file(page) as partial:
            trained = Path(name).expanduser().is_dir() and not overrides
            params = load(name, warn=lambda line: click.echo(f"warning: {line}", err=True)).params if trained else None
            partial.write_text(model_page(Model(config), " ".join((name, *overrides)), params), encoding="utf-8")
    if as_json:
        print_json(facts | ({"page": str(page)} if page is not None else {}))
        return
    click.echo(to_yaml(config))
    print_tree(model_tree(Model(config)))
    click.echo()
    print_result(_lines(facts, is_open) + ([("page", str(page))] if page is not None else []))
    for note in facts["notes"]:
        click.echo(f"note: {note}")


def _lines(facts: dict[str, Any], is_open: bool) -> list[tuple[str, str]]:
    note = " (vocabulary open; counted with GPT-2's)" if is_open else ""
    per_token, whole = facts["kv_cache_bytes_per_token"], facts["state_bytes_at_full_context"]
    context = facts["config"]["context_length"]
    return [
        ("parameters", f"{facts['parameters']:,}{note}"),
        ("active parameters", f"{facts['active_parameters']:,}"),
        ("decoding state", f"{per_token:,} bytes a token, {whole:,} bytes for {context:,} tokens"),
        ("training", f"{facts['flops_per_token'] / 1e6:,.1f} MFLOPs a token at full context"),
        ("attention here", facts["attention_implementation"] or "none can run: see the note"),
    ]
