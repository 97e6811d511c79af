"""`polygpt plan`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from polygpt.cli.output import json_option, overrides_argument, print_json, print_result, print_table
from polygpt.cli.settings import RunCommand, check_settings

if TYPE_CHECKING:
    from polygpt.planning import Plan

ACCELERATORS = ("h100", "h200", "v5p", "v6e")


class _Accelerators(click.Choice):
    """Names of accelerators; the error for another one suggests the nearest."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from polygpt.errors import suggest

        if value.lower() not in self.choices:
            self.fail(f"no accelerator '{value}' is known; {suggest(value.lower(), self.choices)}", param, ctx)
        return value.lower()


@click.command(cls=RunCommand)
@click.argument("name", metavar="RECIPE|PRESET|FILE")
@overrides_argument
@click.option(
    "--accelerator",
    type=_Accelerators(ACCELERATORS),
    default="h100",
    show_default=True,
    help="NVIDIA H100 or H200 (SXM, 8 a node), TPU v5p or v6e.",
)
@click.option("--fit", is_flag=True, help="If it does not fit, look for a layout that does.")
@json_option
def plan(name: str, overrides: tuple[str, ...], accelerator: str, fit: bool, as_json: bool) -> None:
    """Show what each device of a mesh would hold, compute and send in a training step, and how long it would take.

    polygpt plan gpt2_xl mesh.fsdp=256 --accelerator h100

    The step is compiled for up to 512 simulated devices; nothing is allocated or run. The time is a lower bound: every
    device computes at its peak, and only the slowest of its resources counts. A preset is trained by AdamW with a row
    for each device, unless training.batch_size and other training. settings say otherwise; a recipe of the same name
    goes first.
    """
    from polygpt.config import dotted_to_nested, parse_overrides
    from polygpt.recipes import named_fields

    changes = parse_overrides(overrides)
    check_settings(dotted_to_nested(changes))
    named_fields(name)  # refuses a misspelled one

    from polygpt.planning import find_fitting, layout_settings, make_plan, planned_run

    config = planned_run(name, changes)
    _report("compiling the step …")
    found = make_plan(config, accelerator)
    proposed = None
    if fit and not found.fits:
        proposed = find_fitting(found, lambda layout: _report(f"compiling with {layout} …"))
    _report("")
    settings = None if proposed is None else layout_settings(proposed.config, config)
    if as_json:
        proposal = None if proposed is None else {"settings": settings.split(), **proposed.to_dict()}
        print_json(found.to_dict() | ({"proposal": proposal} if fit else {}))
        return
    _print(found)
    if proposed is not None:
        click.echo(f"\nthis fits: {settings}\n")
        _print(proposed)
    elif not found.fits:
        click.echo(f"warning: {_shortage(found, fit)}", err=True)


def _shortage(plan: Plan, searched: bool) -> str:
    facts = plan.to_dict()
    lacking = f"{_size(facts['peak_bytes'])} do not fit into the {_size(facts['memory_bytes'])} of a {plan.accelerator}"
    return lacking + ("; no layout was found that does" if searched else "; --fit looks for a layout that does")


def _report(line: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{line}", err=True, nl=False)


def _print(plan: Plan) -> None:
    facts = plan.to_dict()
    mesh = " × ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1) or "one device"
    rows = [
        ("mesh", f"{mesh}: {facts['devices']} × {plan.accelerator} ({_size(facts['memory_bytes'])} each)"),
        ("batch", f"{facts['batch_size']:,} rows, {facts['tokens_per_step']:,} tokens"),
        ("parameters", _size(facts["parameter_bytes"])),
        ("optimizer", _size(facts["optimizer_bytes"])),
        ("activations", f"{_size(facts['activation_bytes'])}, with gradients and other temporaries"),
        ("peak", f"{_size(facts['peak_bytes'])}: {'fits' if plan.fits else 'DOES NOT FIT'}"),
        ("products", f"{_count(facts['flops_per_step'])}FLOP in {_time(facts['product_seconds'])}"),
        ("memory traffic", _time(facts["memory_seconds"])),
        ("step", f"{_time(facts['step_seconds'])} at least, utilization {facts['utilization']:.0%} at most"),
    ]
    print_result(rows[:2])
    click.echo("\neach device:")
    print_result(rows[2:])
    if facts["collective_bytes"]:
        click.echo()
        columns = [("collectives along", "left"), ("", "left"), ("bytes on a device", "right"), ("time", "right")]
        print_table(columns, _collectives(facts))
    for note in facts["notes"]:
        click.echo(f"note: {note}")


def _collectives(facts: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for axes, kinds in facts["collective_bytes"].items():
        seconds = _time(facts["collective_seconds"][axes])
        for kind, size in sorted(kinds.items(), key=lambda item: -item[1]):
            rows.append((axes.replace("+", ", "), kind, _size(size), seconds))
            axes = seconds = ""
    return rows


def _size(count: float) -> str:
    return f"{_count(count)}B"


def _count(count: float) -> str:
    """Three digits and a prefix: `80.0 G`."""
    for prefix in ("", "k", "M", "G", "T"):
        if count < 999.5 or prefix == "T":
            digits = 0 if count >= 99.95 or not prefix else 1 if count >= 9.995 else 2
            return f"{count:,.{digits}f} {prefix}"
        count /= 1000
    raise AssertionError


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:,.1f} µs"
