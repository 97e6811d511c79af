"""The NNX module of a model as an interactive page, drawn by treescope; one file that needs no network."""

from __future__ import annotations

import html

import jax
import treescope
from flax import nnx

from polygpt.config import to_yaml
from polygpt.model import Model, Params

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 2em; }} h1 {{ font-size: 1.2em; }}</style>
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
    """The page's HTML: every part and parameter, to be unfolded by clicking.

    Without `params` arrays are shapes and dtypes, and nothing is allocated; with them they are drawn.
    """
    shown = jax.eval_shape(lambda: model.init(0)) if params is None else params
    module = model.module(shown)
    del module.config  # stands above, as YAML
    for _, parameter in nnx.iter_graph(module):
        if isinstance(parameter, nnx.Param):  # a Fraction is drawn with its address in memory
            parameter.set_metadata("active", str(parameter.get_metadata("active")))
    arrays = treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer())
    with arrays, treescope.using_expansion_strategy(max_height=60, target_width=120):
        tree = treescope.render_to_html(module, compressed=False)  # readable without a browser, too
    layers = "those of blocks have a leading axis over the layers they serve"
    note = f"{model.num_parameters:,} parameters; {layers}. Click to unfold."
    config = html.escape(to_yaml(model.config))
    return _PAGE.format(title=html.escape(title), note=note, config=config, tree=tree)
