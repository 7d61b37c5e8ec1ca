"""Settings on the command line: ``NAME=VALUE``. This module needs no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.recipe import Recipe
from pyro_sbp.recipes.recipe_files import read_none

__all__ = ["assigned_setting", "with_overrides"]


def assigned_setting(assignment: str) -> str:
    """The name of the setting in ``NAME=VALUE``."""
    return assignment.partition("=")[0].strip().replace("-", "_")


def _value(text: str) -> Any:
    """The value of a TOML expression. Strings need no quotes."""
    if text.lower() in ("none", "null"):
        return "none"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def with_overrides(recipe: Recipe, assignments: Iterable[str], **settings: Any) -> Recipe:
    """A copy of a recipe with other values.

    Args:
        recipe: the recipe.
        assignments: strings ``NAME=VALUE``, with a value as in a TOML file, or ``none``. The weight
            of a single gate is set by ``kl_scale.GATE=VALUE``.
        settings: further settings, which are changed in the same step, because some settings are
            allowed only with others.

    Raises:
        RequestError: a string is not an assignment, the method does not have the setting, or the
            value is out of its bounds.
    """
    changes = dict(settings)
    for assignment in assignments:
        name = assigned_setting(assignment)
        _, equals, text = assignment.partition("=")
        value = _value(text.strip())
        if not name or not equals:
            raise RequestError(f"--set {assignment!r} is not an assignment; expected NAME=VALUE")
        whole, dot, gate = name.partition(".")
        if whole == "kl_scale" and dot:
            before = changes.get(whole, recipe.kl_scale)
            if not isinstance(before, Mapping):
                if before != 1:
                    raise RequestError(
                        f"--set {assignment!r}: kl_scale is {before} for all gates, and would "
                        "become 1 for the gates that are not named; set kl_scale = {...} in a file"
                    )
                before = {}
            changes[whole] = {**before, gate: value}
        elif name == "method":
            raise RequestError("--set cannot change the method; use --method")
        else:
            changes[name] = value
    changes = read_none(changes, type(recipe))
    epochs = changes.pop("epochs", recipe.epochs)
    if epochs != recipe.epochs and isinstance(epochs, int) and not isinstance(epochs, bool):
        recipe = recipe.with_epochs(epochs)
    elif epochs != recipe.epochs:
        changes["epochs"] = epochs  # raises if the method does not have it
    return recipe.replace(**changes) if changes else recipe
