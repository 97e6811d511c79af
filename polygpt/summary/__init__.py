"""What a model is and what it costs, for tables, trees, pages and JSON; computed from shapes without allocating."""

from polygpt.summary.models import Resolved, resolve_model, shown, summary
from polygpt.summary.page import model_page
from polygpt.summary.schedule import schedule_points, schedule_svg
from polygpt.summary.tree import Node, model_tree, served_layers

__all__ = [
    "Node",
    "Resolved",
    "model_page",
    "model_tree",
    "resolve_model",
    "schedule_points",
    "schedule_svg",
    "served_layers",
    "shown",
    "summary",
]
