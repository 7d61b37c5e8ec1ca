"""The settings of a run, the recipes that have a name, and the request of a run.

This package needs no torch.
"""

from pyro_sbp.recipes.criteria import CRITERIA
from pyro_sbp.recipes.method_recipes import METHODS, ORDERS, RBPRecipe, SBPRecipe, SparseVDRecipe
from pyro_sbp.recipes.named import RECIPES, default_recipe
from pyro_sbp.recipes.recipe import Recipe
from pyro_sbp.recipes.recipe_files import read_recipe
from pyro_sbp.recipes.request import PRECISIONS, Request

__all__ = [
    "CRITERIA",
    "METHODS",
    "ORDERS",
    "PRECISIONS",
    "RECIPES",
    "RBPRecipe",
    "Recipe",
    "Request",
    "SBPRecipe",
    "SparseVDRecipe",
    "default_recipe",
    "read_recipe",
]
