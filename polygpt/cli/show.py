"""`polygpt show`."""

from __future__ import annotations

import click

from polygpt.cli.output import json_option, overrides_argument, print_json, print_result, print_table


@click.command()
@click.argument("name", metavar="PRESET|RECIPE|FILE|RUN")
@overrides_argument
@json_option
def show(name: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """The resolved configuration of a model and a table of its parts.

    Settings are written as in a run: polygpt show gpt2 model.num_layers=4
    """
    from polygpt.config import parse_overrides, to_yaml
    from polygpt.summary import parameter_table, resolve_model, summary

    config, is_open = resolve_model(name, parse_overrides(overrides))
    facts = summary(config)
    if as_json:
        print_json(facts)
        return
    click.echo(to_yaml(config))
    columns = [("parameter", "left"), ("shape", "right"), ("axes", "left"), ("count", "right")]
    print_table(columns, parameter_table(config))
    click.echo()
    note = " (vocabulary open; counted with GPT-2's)" if is_open else ""
    print_result(
        [
            ("parameters", f"{facts['parameters']:,}{note}"),
            ("active parameters", f"{facts['active_parameters']:,}"),
            ("KV cache", f"{facts['kv_cache_bytes_per_token']:,} bytes a token"),
            ("training", f"{facts['flops_per_token'] / 1e6:,.1f} MFLOPs a token at full context"),
        ]
    )
