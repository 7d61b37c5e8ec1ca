"""What a training run is asked to do, as a value. This module needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.settings import METHODS, Recipe

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """All that a run was asked for; written to `recipe.json` before any heavy work."""

    arch: str
    dataset: str
    method: str
    recipe: Recipe
    seed: int = 0
    device: str = "cpu"
    data_dir: str = "data"
    weights: str | None = None
    devices: int = 1
    precision: str = "32-true"
    channels_last: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", self.recipe.for_method(self.method))

    def to_dict(self) -> dict[str, Any]:
        """The request as plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """The request from what `to_dict` gave; keys that it does not know are left out."""
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {key: value for key, value in values.items() if key in fields}
        recipe = Recipe.from_dict(known.pop("recipe"), "recipe.json")
        if known["method"] not in METHODS or not isinstance(known.get("seed", 0), int):
            raise RequestError("recipe.json has an unknown method or a seed that is no integer")
        return cls(recipe=recipe, **known)
