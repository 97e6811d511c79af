"""`polygpt presets`."""

from __future__ import annotations

from typing import Any

import click

from polygpt.cli.output import json_option, print_json, print_table
from polygpt.cli.settings import recipe_titles, shown


@click.command()
@json_option
def presets(as_json: bool) -> None:
    """List every preset with its costs, and every recipe.

    A preset is a model, a recipe a whole run. FLOPs per token are those of training at full context.
    """
    from polygpt.presets import PRESET_VOCAB, PRESETS

    rows = [_row(name) for name in PRESETS]
    if as_json:
        print_json(rows)
        return
    columns = [("preset", "left"), ("layers", "right"), ("width", "right"), ("vocab", "right")]
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


def _row(name: str) -> dict[str, Any]:
    answer = shown(name)
    config = answer["facts"]["config"]
    width = config["embed_dim"] or config["vocab_size"]
    return {"preset": name, "open_vocabulary": answer["vocabulary"] is not None, "width": width, **answer["facts"]}
