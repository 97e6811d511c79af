"""The NNX module of a model as an interactive page, rendered by treescope: one file, no network needed."""

from __future__ import annotations

import html

import jax
import treescope
from flax import nnx

from polygpt.config import to_yaml
from polygpt.model import Model, Params

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
pre, *::part(treescope_root) {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{note}</p>
<details><summary>configuration</summary><pre>{config}</pre></details>
{tree}
</body>
</html>
"""


def model_page(model: Model, title: str, params: Params | None = None) -> str:
    """The page's HTML: every part and parameter, unfolded by clicking.

    Without `params`, arrays are shapes and dtypes and nothing is allocated; with them, their values are drawn.
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
    return _PAGE.format(title=html.escape(title), note=note, config=config, tree=tree)
