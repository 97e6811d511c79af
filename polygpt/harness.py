"""lm-evaluation-harness' own command with `--model polygpt` known to it.

    python -m polygpt.harness run --model polygpt --model_args model=runs/demo --tasks arc_easy

The harness (0.4.13) finds models by name in a registry of its own and loads no plugins, so the name has to be
registered in the process that runs its command.
"""

from __future__ import annotations

import sys
from functools import partial

from polygpt.errors import PolygptError
from polygpt.evaluation import register_harness_model
from polygpt.loading import load


def main() -> None:
    """The harness's command line."""
    try:
        register_harness_model(partial(load, weights="auto", for_text=True))
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except PolygptError as error:
        print(f"polygpt: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
