"""Convert the recipes of earlier versions. This module needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_sbp.recipes.method_recipes import RECIPE_CLASSES
from pyro_sbp.recipes.recipe import setting_names

__all__ = ["recipe", "request"]

#: All settings of the first format. Every recipe had all of them, whatever its method.
_SETTINGS = frozenset(name for cls in RECIPE_CLASSES.values() for name in setting_names(cls))


def recipe(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Keep only those settings of a recipe that its method has.

    Earlier versions did not allow other values than the default for the settings that are removed
    here. Unknown names are kept: reading the recipe raises an error for them.
    """
    others = _SETTINGS - set(setting_names(RECIPE_CLASSES[method]))
    return {name: value for name, value in values.items() if name not in others}


def request(values: Any) -> Mapping[str, Any]:
    """Convert the recipe in the values of a request. Values that are not a request are returned
    unchanged: reading them raises an error."""
    if not isinstance(values, Mapping):
        raise ValueError("it does not contain an object")
    found, method = values.get("recipe"), values.get("method")
    if not isinstance(found, Mapping) or method not in RECIPE_CLASSES:
        return values
    return {**values, "recipe": recipe(found, method)}
