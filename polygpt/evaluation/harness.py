"""lm-evaluation-harness (Gao et al. 2021), an optional package: its tasks on a polygpt model.

Its view of a model is in `harness_lm.py`, which imports the package and is imported only where that is installed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from polygpt.errors import PolygptError, RequestError, suggest
from polygpt.evaluation.scoring import ProgressCallback, no_progress
from polygpt.language_model import LanguageModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# The name under which lm-evaluation-harness knows the model.
MODEL_NAME = "polygpt"


def require_harness() -> ModuleType:
    """The package of lm-evaluation-harness.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise RequestError(
            "tasks of lm-evaluation-harness need a package that is not installed here; "
            f'install it with: pip install "polygpt[eval]" ({error})'
        ) from None
    return lm_eval


def register_harness_model(load: Callable[[str], LanguageModel]) -> None:
    """Makes `polygpt` a model of the harness's own command; its argument `model` is what `load` opens.

    Raises:
        RequestError: the harness is not installed.
    """
    require_harness()
    from polygpt.evaluation.harness_lm import register

    register(load, MODEL_NAME)


def task_manager(task: str, include_path: str | None = None) -> TaskManager:
    """The harness's index of tasks, with those of the folder `include_path`.

    Raises:
        RequestError: it is not installed, or has no task, group or tag of this name.
    """
    manager = _index(include_path)
    if task not in manager.all_tasks:
        raise RequestError(
            f"no task '{task}'; {_nearest(task, ['perplexity', 'hellaswag', *manager.all_tasks])} "
            "(polygpt's own: perplexity, hellaswag; the rest are lm-evaluation-harness')"
        )
    return manager


@lru_cache(maxsize=4)
def _index(include_path: str | None) -> TaskManager:
    """Made once: the harness reads thousands of files for it, 8 s on two cores."""
    require_harness()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _nearest(task: str, names: list[str]) -> str:
    hint = suggest(task, names)
    return hint if hint.startswith("did you mean") else "`lm-eval ls tasks` lists them"


def run_harness(
    lm: LanguageModel,
    task: str,
    manager: TaskManager,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    progress: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` gives for one task (or group, or tag), its samples included.

    Raises:
        PolygptError: the harness fails, as it does where a task's data is neither here nor can be downloaded.
    """
    harness = require_harness()
    from polygpt.evaluation.harness_lm import HarnessLM

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        # Standard output is the command's own.
        with contextlib.redirect_stdout(sys.stderr):
            return harness.simple_evaluate(
                HarnessLM(lm, progress=progress),
                tasks=[task],
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
            )
    except PolygptError:
        raise
    except Exception as error:  # tasks are programs of their own and may raise anything
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise PolygptError(f"{task}: lm-evaluation-harness failed: {type(error).__name__}: {reason}") from error


def metrics_of(results: dict[str, Any], task: str) -> dict[str, float | None]:
    """The numbers of `run_harness` by name: `acc`, `acc_stderr`; of a group's members `member/acc`.

    A filter other than the harness's `none` is part of the name, as in `exact_match,strict-match`.
    """
    found: dict[str, float | None] = {}
    for name, values in results["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if metric in ("alias", "name", "sample_len", "sample_count"):
                continue
            key = metric if chosen in ("", "none") else key
            number = float(value) if isinstance(value, int | float) and abs(value) < float("inf") else None
            found[key if name == task else f"{name}/{key}"] = number
    return found


def samples_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each example: the task, its number in it, the target, and what the model said."""
    kept = ("doc_id", "target", "filtered_resps")
    lines = [
        {"task": task, **{key: sample.get(key) for key in kept}}
        for task, samples in results.get("samples", {}).items()
        for sample in samples
    ]
    return json.loads(json.dumps(lines, default=str))
