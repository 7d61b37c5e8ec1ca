"""The settings of a run, the recipes that have a name, and the request of a run.

This package needs no torch.
"""

from pyro_sbp.recipes.named import RECIPES, default_recipe
from pyro_sbp.recipes.request import PRECISIONS, Request
from pyro_sbp.recipes.settings import (
    METHODS,
    ORDERS,
    THRESHOLDS,
    RBPRecipe,
    Recipe,
    SBPRecipe,
    SparseVDRecipe,
    read_recipe,
)

__all__ = [
    "METHODS",
    "ORDERS",
    "PRECISIONS",
    "RECIPES",
    "THRESHOLDS",
    "RBPRecipe",
    "Recipe",
    "Request",
    "SBPRecipe",
    "SparseVDRecipe",
    "default_recipe",
    "read_recipe",
]
