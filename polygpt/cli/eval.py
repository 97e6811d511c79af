"""`polygpt eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from polygpt.cli.output import (
    dtype_option,
    json_option,
    mesh_argument,
    mesh_of,
    print_json,
    print_result,
    reading,
    weights_option,
)

OWN = ("perplexity", "hellaswag")  # any other task is one of lm-evaluation-harness
# The settings of each.
SETTINGS = {
    "perplexity": ("data", "stride", "context", "start", "documents", "text_key"),
    "hellaswag": ("data", "limit"),
    "lm_eval": ("limit", "num_fewshot", "include_path"),
}
UNITS = {"perplexity": "windows", "hellaswag": "questions", "lm_eval": "requests"}


@click.command()
@click.argument("model", metavar="MODEL")
@mesh_argument
@click.option("--task", required=True, help="perplexity, hellaswag, or a task of lm-evaluation-harness.")
@click.option("--data", help="The text, or a .jsonl of documents or of HellaSwag's questions.")
@click.option("--stride", type=int, help="perplexity: tokens between windows.  [default: half of the context]")
@click.option("--context", type=int, help="perplexity: tokens a window.  [default: the model's context]")
@click.option(
    "--no-start", "start", flag_value=False, default=None, help="perplexity: no end-of-text token before the text."
)
@click.option(
    "--documents",
    is_flag=True,
    default=None,
    help="perplexity: <|endoftext|> in the text divides documents.  [default: ordinary text]",
)
@click.option("--text-key", help="perplexity: the key of a .jsonl object that holds the text.  [default: text]")
@click.option("--limit", type=int, help="Only the first so many examples.")
@click.option("--num-fewshot", type=int, help="lm-evaluation-harness: solved examples before each question.")
@click.option("--include-path", help="lm-evaluation-harness: a folder of more tasks.")
@click.option("--out", type=click.Path(path_type=Path), help="Write a line of JSON for each example here.")
@dtype_option
@weights_option
@json_option
def eval(
    model: str,
    mesh: tuple[str, ...],
    task: str,
    out: Path | None,
    dtype: str | None,
    weights: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure a model.

    MODEL is a run's folder or anything else that `polygpt generate` takes.

    \b
    polygpt eval runs/demo --task perplexity --data book.txt
    polygpt eval runs/demo --task hellaswag --data hellaswag_val.jsonl --out choices.jsonl
    polygpt eval runs/demo --task arc_easy --limit 100
    polygpt eval runs/demo --task perplexity --data book.txt mesh.data=8
    """
    from polygpt.presets import check_model_name

    check_model_name(model)

    from polygpt.evaluation import progress_bar
    from polygpt.files import new_file
    from polygpt.sharding import use_mesh

    config = _configured(task, settings)
    config.check()
    _check_out(out, task, config.kind)
    lm = reading(model, dtype, {}, weights=weights or "auto", for_text=True, mesh=mesh_of(mesh))
    ready = config.prepare(lm.tokenizer, lm.config.context_length)
    with progress_bar(task, UNITS[config.kind]) as progress, use_mesh(lm.scope):
        outcome = ready(lm, progress)
    if out is not None:
        with new_file(out) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in outcome.rows), encoding="utf-8")
    found = {**outcome.metrics, **outcome.facts}
    if as_json:
        asked = {"model": model, "task": task, "data": settings["data"], "parameters": lm.num_parameters}
        asked |= {"weights": lm.packed or lm.config.param_dtype}
        print_json(asked | found | ({"out": str(out)} if out is not None else {}))
        return
    print_result([(name.replace("_", " "), _shown(value)) for name, value in found.items()])


def _configured(task: str, settings: dict[str, Any]) -> Any:
    """The evaluation that the options describe; an option that the task does not have is refused, not ignored."""
    from polygpt.config import validate
    from polygpt.errors import RequestError, suggest
    from polygpt.evaluation import EVALUATIONS

    kind = task if task in OWN else "lm_eval"
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in SETTINGS[kind]:
            option = "--no-start" if name == "start" else "--" + name.replace("_", "-")
            near = suggest(task, OWN) if kind == "lm_eval" else ""
            hint = near if near.startswith("did you mean") else f"it is of {_takers(name)}"
            raise RequestError(f"{option} does not go with --task {task}; {hint}")
    if kind == "lm_eval":
        return validate(EVALUATIONS[kind], {"task": task, **given})
    if "data" not in given:
        what = "the text" if task == "perplexity" else "HellaSwag's .jsonl"
        raise RequestError(f"--task {task} needs --data FILE: {what}")
    return validate(EVALUATIONS[kind], {("path" if name == "data" else name): value for name, value in given.items()})


def _takers(name: str) -> str:
    takers = [kind for kind, names in SETTINGS.items() if name in names]
    return " and ".join("lm-evaluation-harness' tasks" if kind == "lm_eval" else kind for kind in takers)


def _check_out(out: Path | None, task: str, kind: str) -> None:
    """Refuses an --out that cannot be written, before hours have gone into scoring."""
    from polygpt.errors import RequestError

    if out is not None and kind == "perplexity":
        raise RequestError(f"--out does not go with --task {task}, which has no examples")
    if out is not None and out.exists():
        raise RequestError(f"{out}: exists already; choose another --out")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
