"""What training would take on a mesh of other devices than this machine's: memory, products, collectives, time."""

from polygpt.planning.fit import find_fitting, layout_settings
from polygpt.planning.plan import Plan, make_plan
from polygpt.planning.request import LARGEST_MESH, planned_run

__all__ = ["LARGEST_MESH", "Plan", "find_fitting", "layout_settings", "make_plan", "planned_run"]
