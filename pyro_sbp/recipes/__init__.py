"""The settings of a run, the recipes that have a name, and the request of a run.

This package needs no torch.
"""

from pyro_sbp.recipes.named import RECIPES, default_recipe
from pyro_sbp.recipes.request import Request
from pyro_sbp.recipes.settings import METHODS, ORDERS, PRECISIONS, THRESHOLDS, Recipe, read_recipe

__all__ = [
    "METHODS",
    "ORDERS",
    "PRECISIONS",
    "RECIPES",
    "THRESHOLDS",
    "Recipe",
    "Request",
    "default_recipe",
    "read_recipe",
]
