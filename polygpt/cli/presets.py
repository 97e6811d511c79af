"""`polygpt presets`."""

from __future__ import annotations

from typing import Any

import click

from polygpt.cache import kept
from polygpt.cli.output import json_option, print_json, print_table
from polygpt.cli.settings import recipe_titles


@click.command()
@json_option
def presets(as_json: bool) -> None:
    """List every preset with its costs, and every recipe.

    A preset is a model, a recipe a whole run. FLOPs per token are those of training at full context.
    """
    from polygpt.presets import PRESET_VOCAB

    rows = kept(["presets"], _rows)
    if as_json:
        print_json(rows)
        return
    columns = [("preset", "left"), ("layers", "right"), ("embed_dim", "right"), ("vocab", "right")]
    columns += [("parameters", "right"), ("active", "right"), ("KV bytes/token", "right"), ("MFLOPs/token", "right")]
    print_table(
        columns,
        (
            (
                row["preset"] + ("" if row["causal_in_training"] else " †"),
                row["config"]["num_layers"],
                row["width"],
                f"{row['config']['vocab_size']:,}" + ("*" if row["open_vocabulary"] else ""),
                row["parameters"],
                row["active_parameters"],
                row["kv_cache_bytes_per_token"],
                f"{row['flops_per_token'] / 1e6:,.0f}",
            )
            for row in rows
        ),
    )
    click.echo(f"* the tokenizer's vocabulary; counted here with {PRESET_VOCAB:,} (GPT-2's)")
    click.echo("† not causal in training: its training loss is not that of a language model (polygpt show says why)")
    click.echo()
    print_table([("recipe", "left"), ("", "left")], recipe_titles().items())


def _rows() -> list[dict[str, Any]]:
    from polygpt.presets import PRESETS
    from polygpt.summary import resolve_model, summary

    found = {name: resolve_model(name) for name in PRESETS}
    return [
        {
            "preset": name,
            "open_vocabulary": resolved.vocabulary is not None,
            "width": resolved.model.embed_dim or resolved.model.vocab_size,
            **summary(resolved.model),
        }
        for name, resolved in found.items()
    ]
