"""`polygpt train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from polygpt.cli.output import json_option, overrides_argument, print_json, print_result
from polygpt.cli.settings import RunCommand, check_file, check_settings, check_sources
from polygpt.files import expand
from polygpt.process import command_line


@click.command(cls=RunCommand)
@click.argument("recipe", required=False, metavar="[RECIPE|FILE]")
@overrides_argument
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [required]")
@click.option("--resume", is_flag=True, help="Continue the run in --out; needs no recipe.")
@click.option("--short", is_flag=True, help="The recipe's short form: a minute or two on a laptop.")
@click.option("--check", is_flag=True, help="Exit with 1 if the validation loss is outside the recipe's band.")
@click.option("--profile", metavar="START:STOP", help="Trace these steps with JAX's profiler into RUN/profile.")
@click.option("--coordinator", metavar="HOST:PORT", help="Train in several processes: the address of process 0.")
@click.option("--num-processes", metavar="N", type=int, help="How many processes; left out under SLURM or MPI.")
@click.option("--process-id", metavar="I", type=int, help="Which one this is, 0 to N - 1; left out likewise.")
@json_option
def train(
    recipe: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    short: bool,
    check: bool,
    profile: str | None,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    as_json: bool,
) -> None:
    """Train a model from a recipe or a YAML file, with settings changed by KEY=VALUE.

    polygpt train shakespeare_char_cpu data.path=input.txt training.steps=500 --out runs/try
    """
    from polygpt.config import parse_overrides
    from polygpt.distributed import find_launch, is_main, start

    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        recipe, overrides = None, (recipe, *overrides)
    changes = parse_overrides(overrides)
    _check(recipe, changes, out, resume, short)

    launch = find_launch(coordinator, num_processes, process_id)
    if launch is not None:
        start(launch)

    from polygpt.recipes import load_recipe, resume_config, verdict
    from polygpt.training import Profile
    from polygpt.training import train as run_training

    traced = None if profile is None else Profile.parse(profile)

    if resume:
        config = resume_config(out, recipe, changes, short=short)
    else:
        config = load_recipe(recipe, changes, short=short)
    listeners = None
    if check:
        from polygpt.recipes import HeldOutCheck, as_written, check_band
        from polygpt.training.listeners import standard_listeners

        check_band(recipe or str(out / "config.yaml"), config, as_written(recipe, short=short) if recipe else config)
        listeners = [HeldOutCheck(), *standard_listeners()]
    result = run_training(config, out, resume=resume, listeners=listeners, profile=traced)
    found = verdict(config, result)
    if not is_main():
        pass
    elif as_json:
        band = None if found is None else {"low": found.low, "high": found.high, "within": found.within}
        print_json({**dataclasses.asdict(result), "band": band})
    else:
        bits = f"{result.val_bits_per_byte:.4f} bits per byte"
        print_result(
            [
                ("run", result.run),
                ("validation loss", f"{result.val_loss:.4f} nats a token, {bits}"),
                *([("band", str(found))] if found is not None else []),
                ("training loss", f"{result.train_loss:.4f}"),
                ("speed", f"{result.tokens_per_second:,.0f} tokens/s"),
                *([("warning", result.warning)] if result.warning is not None else []),
                ("report", str(out / "report.html")),
                ("next", command_line("generate", result.run, "--prompt", "…")),
            ]
        )
    if check and not found.within:
        raise click.exceptions.Exit(1)


def _check(recipe: str | None, changes: Mapping[str, Any], out: Path | None, resume: bool, short: bool) -> None:
    """Refuses what can be refused before JAX is imported; a misspelled key before a missing --out."""
    from polygpt.config import dotted_to_nested
    from polygpt.errors import RequestError
    from polygpt.folders import check_new_run, check_run
    from polygpt.recipes import check_placeholders, recipe_fields

    if recipe is None and not resume:
        raise RequestError("name a recipe or a .yaml file, or continue a run with --resume")
    if recipe is None and short:
        raise RequestError("--short is the short form of a recipe; name one (a run resumed without one is as it was)")
    if recipe is not None and Path(recipe).suffix in (".yaml", ".yml"):
        check_file(expand(recipe))
    fields = dotted_to_nested(changes) if recipe is None else recipe_fields(recipe, changes, short=short)
    check_settings(fields)
    if out is None:
        raise click.MissingParameter(ctx=click.get_current_context(), param_hint="'--out'", param_type="option")
    if resume:
        check_run(expand(out))
    else:
        check_placeholders(recipe, changes, short=short)
        check_new_run(expand(out))
        check_sources(fields)
