"""What a model is and costs, for tables, trees, pages and JSON; computed from shapes, nothing allocated."""

from polygpt.summary.models import preset_summaries, resolve_model, summary
from polygpt.summary.page import model_page
from polygpt.summary.tree import Node, model_tree, served_layers

__all__ = [
    "Node",
    "model_page",
    "model_tree",
    "preset_summaries",
    "resolve_model",
    "served_layers",
    "summary",
]
