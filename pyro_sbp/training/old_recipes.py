"""Recipes that earlier versions wrote. This module needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_sbp.recipes.settings import RECIPE_CLASSES, method_settings

__all__ = ["recipe", "request"]

#: All settings of the first format, which every recipe had whatever its method.
_SETTINGS = frozenset(name for method in RECIPE_CLASSES for name in method_settings(method))


def recipe(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings of a recipe that its method has.

    An earlier version refused to set one that the method did not have, so what is left out here
    had its default. Unknown names stay, for the reader to refuse.
    """
    others = _SETTINGS - set(method_settings(method))
    return {name: value for name, value in values.items() if name not in others}


def request(values: Any) -> Mapping[str, Any]:
    """The values of a request, with a recipe of its method. What is not a request stays as it is,
    for the reader to refuse."""
    if not isinstance(values, Mapping):
        raise ValueError("it holds no object")
    found, method = values.get("recipe"), values.get("method")
    if not isinstance(found, Mapping) or method not in RECIPE_CLASSES:
        return values
    return {**values, "recipe": recipe(found, method)}
