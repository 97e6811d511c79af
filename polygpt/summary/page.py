"""The NNX module of a model as an interactive page, rendered by treescope: one file, no network needed."""

from __future__ import annotations

import html
from typing import Any

import jax
import treescope
from flax import nnx

from polygpt.config import to_yaml
from polygpt.model import Model, Params
from polygpt.summary.schedule import schedule_svg

# How a parameter is initialised and counted: of no use to whoever looks at its shape.
HIDDEN = {"stack", "active", "mean", "deviation", "trained"}

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
h1 {{ font-size: 1.2em; }}
h2 {{ font-size: 1em; }}
pre, *::part(treescope_root) {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{note}</p>
<details><summary>configuration</summary><pre>{config}</pre></details>
{schedule}
{tree}
</body>
</html>
"""


def model_page(model: Model, title: str, params: Params | None = None, schedule: dict[str, Any] | None = None) -> str:
    """The page's HTML: every part and parameter, unfolded by clicking.

    Without `params`, arrays are shapes and dtypes and nothing is allocated; with them, their values are drawn.
    `schedule` are the points of a run's learning rate (`schedule_points`).
    """
    shown = jax.eval_shape(lambda: model.init(0)) if params is None else params
    module = model.module(shown)
    del module.config  # shown above the tree, as YAML
    for _, parameter in nnx.iter_graph(module):
        if isinstance(parameter, nnx.Param):
            for name in HIDDEN & parameter.get_metadata().keys():
                parameter.del_metadata(name)
    arrays = treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer())
    with arrays, treescope.using_expansion_strategy(max_height=60, target_width=120):
        tree = treescope.render_to_html(module, compressed=False)  # readable without a browser, too
    layers = "those of blocks have a leading axis over their layers"
    note = f"{model.num_parameters:,} parameters; {layers}. Click to unfold."
    config = html.escape(to_yaml(model.config))
    drawn = "" if schedule is None else f"<h2>Learning rate: {schedule['kind']}</h2>\n{schedule_svg(schedule)}"
    return _PAGE.format(title=html.escape(title), note=note, config=config, tree=tree, schedule=drawn)
