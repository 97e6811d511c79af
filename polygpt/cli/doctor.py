"""`polygpt doctor`."""

from __future__ import annotations

import sys
from typing import Any

import click

from polygpt.cli.output import json_option, print_json, print_result


@click.command()
@click.option("--coordinator", metavar="HOST:PORT", help="Check several processes together: the address of process 0.")
@click.option("--num-processes", metavar="N", type=int, help="How many processes; left out under SLURM or MPI.")
@click.option("--process-id", metavar="I", type=int, help="Which one this is, 0 to N - 1; left out likewise.")
@json_option
def doctor(coordinator: str | None, num_processes: int | None, process_id: int | None, as_json: bool) -> int:
    """Show the devices and libraries of this machine, and check that they compute correctly.

    The attention kernels that training would use are run beside the reference, and a small array is summed over all
    devices. The exit code is 1 if something is wrong.

    In a cluster it is started in every process, as training is, and the sum is over the devices of all of them.
    """
    from polygpt.distributed import find_launch, is_main, start

    launch = find_launch(coordinator, num_processes, process_id)
    if launch is not None:
        start(launch)

    from polygpt.diagnosis import diagnose

    terminal = sys.stderr.isatty() and is_main()
    facts = diagnose(lambda step: click.echo(f"\r\x1b[Kchecking {step} …", err=True, nl=False) if terminal else None)
    if terminal:
        click.echo("\r\x1b[K", err=True, nl=False)
    if is_main():
        if as_json:
            print_json(facts)
        else:
            print_result(_lines(facts))
        for problem in facts["problems"]:
            click.echo(f"problem: {problem}", err=as_json)
    return 1 if facts["problems"] else 0


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    memory, reduced = facts["memory"], facts["all_reduce"]
    libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    checks = [
        (
            f"attention, {check['case']}",
            f"{check['kernel']}: {'agrees with' if check['agrees'] else 'DIFFERS FROM'} the reference "
            f"(error {check['error']:.1g}, of gradients {check['gradient_error']:.1g})",
        )
        for check in facts["attention"]
    ]
    rate = reduced["bytes"] / reduced["seconds"] / 1e9
    return [
        ("polygpt", f"{facts['polygpt']}, Python {facts['python']}, {facts['system']}"),
        ("libraries", libraries),
        *(("devices", _device(device, facts["processes"])) for device in facts["devices"]),
        ("processes", f"{facts['processes']}, this is number {facts['process']}"),
        ("memory", f"{memory['machine_bytes'] / 1e9:,.1f} GB, {memory['cpu_cores']} CPU cores"),
        ("interconnect", facts["interconnect"]),
        *([("decoding", facts["native"])] if facts["native"] else []),
        *checks,
        (
            f"all-reduce over {reduced['devices']}",
            f"{'right' if reduced['correct'] else 'WRONG'}: {reduced['bytes'] / 2**20:,.0f} MiB in "
            f"{reduced['seconds'] * 1e3:,.2f} ms ({rate:,.1f} GB/s)",
        ),
    ]


def _device(device: dict[str, Any], processes: int) -> str:
    peak = device["bfloat16_flops"]
    parts = [f"{device['count']} × {device['kind']}"]
    parts += [f"{device['local']} in this process"] if processes > 1 else []
    parts += [f"{device['memory_bytes'] / 1e9:,.1f} GB each"] if device["memory_bytes"] else []
    parts += [f"peak {peak / 1e12:,.0f} TFLOP/s in bfloat16"] if peak else []
    return ", ".join(parts)
