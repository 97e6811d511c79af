"""`polygpt show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from polygpt.cli.output import json_option, overrides_argument, print_json, print_result, print_schedule, print_tree
from polygpt.cli.settings import RunCommand, shown


@click.command(cls=RunCommand)
@click.argument("name", metavar="PRESET|RECIPE|FILE|RUN")
@overrides_argument
@click.option("--html", "page", type=click.Path(path_type=Path), help="Also write an interactive page to this file.")
@json_option
def show(name: str, overrides: tuple[str, ...], page: Path | None, as_json: bool) -> None:
    """Show the resolved configuration of a model or a run, the tree of the model's parts, and its costs.

    Of a run, the learning-rate schedule is drawn as well.

    Settings are written as for `train`: polygpt show gpt2 model.num_layers=4

    The HTML page shows shapes; for a run's folder without settings it also shows the weights.
    """
    answer = shown(name, overrides)
    facts = answer["facts"]
    if page is not None:
        _write_page(page, name, overrides, facts.get("schedule"))
    if as_json:
        print_json(facts | ({"page": str(page)} if page is not None else {}))
        return
    click.echo(answer["yaml"])
    print_tree(answer["tree"])
    click.echo()
    if "schedule" in facts:
        print_schedule(facts["schedule"])
        click.echo()
    print_result(_lines(facts, answer["vocabulary"]) + ([("page", str(page))] if page is not None else []))
    for note in facts["notes"]:
        click.echo(f"note: {note}")


def _write_page(page: Path, name: str, overrides: tuple[str, ...], schedule: dict[str, Any] | None) -> None:
    from polygpt.config import parse_overrides
    from polygpt.files import expand, new_file
    from polygpt.loading import load
    from polygpt.model import model_of
    from polygpt.summary import model_page, resolve_model

    model = model_of(resolve_model(name, parse_overrides(overrides)).model)
    with new_file(page) as partial:
        trained = expand(name).is_dir() and not overrides
        params = load(name, warn=lambda line: click.echo(f"warning: {line}", err=True)).params if trained else None
        partial.write_text(model_page(model, " ".join((name, *overrides)), params, schedule), encoding="utf-8")


def _lines(facts: dict[str, Any], vocabulary: str | None) -> list[tuple[str, str]]:
    config, training = facts["config"], facts["training_bytes"]
    per_token, whole = facts["kv_cache_bytes_per_token"], facts["state_bytes_at_full_context"]
    parts = [f"{size:,} ({name.replace('_', ' ')})" for name, size in training.items()]
    lines = [("vocabulary", f"{config['vocab_size']:,} ({vocabulary})")] if vocabulary else []
    return [
        *lines,
        ("parameters", f"{facts['parameters']:,}, {facts['non_embedding_parameters']:,} without embeddings"),
        ("active parameters", f"{facts['active_parameters']:,}"),
        ("decoding state", f"{per_token:,} bytes a token, {whole:,} bytes for {config['context_length']:,} tokens"),
        ("training", f"{facts['flops_per_token'] / 1e6:,.1f} MFLOPs a token at full context"),
        ("training memory", f"{' + '.join(parts)} bytes, and activations"),
        *_mesh_lines(facts.get("mesh")),
        ("attention here", facts["attention_implementation"] or "none can run: see the note"),
    ]


def _mesh_lines(mesh: dict[str, Any] | None) -> list[tuple[str, str]]:
    if mesh is None:
        return []
    devices = f"{mesh['layout']}: {mesh['parameter_bytes']:,} bytes of parameters on each of {mesh['devices']} devices"
    return [("mesh", devices), *(("", line) for line in mesh["replicated"])]
