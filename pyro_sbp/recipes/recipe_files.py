"""Recipes in TOML files. Needs no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pyro_sbp.errors import RequestError, did_you_mean
from pyro_sbp.recipes.method_recipes import RECIPE_CLASSES
from pyro_sbp.recipes.recipe import Recipe

__all__ = ["read_none", "read_recipe"]


def read_none(values: Mapping[str, Any], cls: type[Recipe]) -> dict[str, Any]:
    """Settings with None in place of the string "none", for settings that may be None."""
    fields = cls.__pydantic_fields__  # type: ignore[attr-defined]  # pydantic adds it
    return {
        name: None
        if value == "none" and name in fields and type(None) in get_args(fields[name].annotation)
        else value
        for name, value in values.items()
    }


def read_recipe(path: Path, method: str | None = None) -> Recipe:
    """Read a recipe from a TOML file.

    Settings that are not in the file have their defaults.

    TOML has no null. The string "none" means None for settings that may be None.

    Args:
        path: the file; it may name its `method`.
        method: the method of the recipe. The default is the method that the file names, else "sbp".

    Raises:
        RequestError: the file cannot be read, is not TOML, is for another method, or has an invalid
            setting.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the recipe {path} is not TOML: {error}") from error
    named = values.pop("method", None)
    if named is not None and named not in RECIPE_CLASSES:
        raise RequestError(
            f"{path}: method is {named!r}; expected {', '.join(RECIPE_CLASSES)}"
            + (did_you_mean(named, RECIPE_CLASSES) if isinstance(named, str) else "")
        )
    if named is not None and method not in (None, named):
        raise RequestError(
            f"the recipe {path} is for {named}, and --method is {method}; leave out --method, or "
            "choose another recipe"
        )
    cls = RECIPE_CLASSES[named or method or "sbp"]
    return cls.from_dict({"name": path.stem, **read_none(values, cls)}, str(path))
