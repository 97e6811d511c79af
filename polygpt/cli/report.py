"""`polygpt report`."""

from __future__ import annotations

from pathlib import Path

import click

from polygpt.cli.output import json_option, print_json, print_result


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page.  [default: RUN/report.html or comparison.html]")
@click.option("--x", type=click.Choice(["steps", "tokens"]), help="What the curves of several runs are drawn over.")
@json_option
def report(runs: tuple[Path, ...], out: Path | None, x: str | None, as_json: bool) -> None:
    """Redraw the report of a run, or overlay the curves of several in one page, with a PNG beside it.

    polygpt report runs/one runs/two --out comparison.html

    Curves are drawn over tokens if the runs' steps see different numbers of them, otherwise over steps. Runs may be
    unfinished.
    """
    from polygpt.errors import RequestError
    from polygpt.folders import check_run

    if out is not None and (out.is_dir() or out.suffix.lower() not in (".html", ".htm")):
        raise RequestError(f"--out {out}: the page is a file that ends in .html")
    if len(runs) == 1 and x is not None:
        raise RequestError("--x is for several runs: the report of one is drawn over steps")

    for run in runs:
        check_run(run)

    from polygpt.training.listeners import compare_runs, write_report

    if len(runs) == 1:
        page = str(write_report(runs[0], out=out))
        print_json({"page": page}) if as_json else print_result([("report", page)])
        return
    done = compare_runs(runs, out or Path("comparison.html"), x)
    if as_json:
        print_json(done._asdict())
        return
    lines = [(row["name"], _line(row)) for row in done.runs]
    print_result([*lines, ("page", done.page), ("plot", done.plot)])


def _line(row: dict) -> str:
    state = f"{row['steps']} steps" if row["finished"] else f"{row['steps']} of {row['of_steps']} steps, unfinished"
    held_out = "" if row["val_loss"] is None else f"validation loss {row['val_loss']:.4f}, "
    return f"{held_out}training loss {row['train_loss']:.4f}, {state}"
