"""Recipes by name: what a newcomer gets by default, and what the papers did."""

from __future__ import annotations

from pyro_sbp.recipes import Recipe

__all__ = ["RECIPES", "default_recipe"]

_ALL = (
    Recipe(
        name="lenet5",
        dense_epochs=8,
        epochs=22,
        finetune_epochs=6,
        kl_scale={"conv1": 100.0, "conv2": 40.0, "fc1_input": 3.0, "fc1": 3.0},
    ),
    Recipe(name="lenet-dense", dense_epochs=10, epochs=40, finetune_epochs=10, kl_scale=3.0),
    # 1,437 examples: forty times fewer steps an epoch, and a KL that weighs forty times more.
    Recipe(
        name="digits",
        dense_epochs=20,
        epochs=60,
        finetune_epochs=20,
        batch_size=32,
    ),
)

RECIPES = {recipe.name: recipe for recipe in _ALL}

#: The default recipe of an architecture; others get the plain defaults.
_BY_ARCH = {
    "lenet5": "lenet5",
    "lenet-500-300": "lenet-dense",
    "lenet-300-100": "lenet-dense",
}


def default_recipe(arch: str, dataset: str, method: str) -> Recipe:
    """The recipe that a request gets which names none."""
    if dataset == "digits":
        return RECIPES["digits"]
    return RECIPES[_BY_ARCH[arch]] if arch in _BY_ARCH else Recipe()
