"""The request of a training run, as a value. This module needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.method_recipes import RECIPE_CLASSES
from pyro_sbp.recipes.recipe import Recipe
from pyro_sbp.recipes.validation import STRICT, refusing

__all__ = ["PRECISIONS", "Precision", "Request"]

#: "bf16-mixed" has parameters in float32, and computes matrix products in bfloat16.
Precision = Literal["32-true", "bf16-mixed", "64-true"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class PixelStatistics(TypedDict):
    """The mean and the standard deviation of pixels in [0, 1], by channel."""

    mean: list[float]
    std: list[float]


@refusing
@dataclass(frozen=True, config=STRICT)
class Request:
    """The request of a run. It is written to `recipe.json` when the run starts.

    Attributes:
        arch: the network, a name of `ARCHITECTURES` or ``package.module:callable``.
        dataset: the data set, as for `load_dataset`.
        recipe: the settings. Their class determines the method.
        seed: the seed of all random numbers.
        device: "cpu" or "cuda".
        data_dir: the directory of the data sets.
        weights: a file of weights to start from.
        devices: the number of processes.
        precision: one of `PRECISIONS`.
        channels_last: whether to use the channels-last memory format.
        image_size: the height and the width to which images are resized. With None they are those
            of the architecture, or of the data.
        standardize_by: the statistics for standardizing images, such as those with which the
            weights were trained. With None the recipe decides.
        teachers: directories of other runs. Fine-tuning with `distill` learns the average
            predictions of their dense networks. Without `teachers`, it learns the predictions of
            the network of this run before its last cut.

    Raises:
        RequestError: a value has a wrong type or is out of its bounds.
    """

    arch: str
    dataset: str
    recipe: Recipe
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "cpu"
    data_dir: str = "data"
    weights: str | None = None
    devices: Annotated[int, Field(ge=1)] = 1
    precision: Precision = "32-true"
    channels_last: bool = False
    image_size: Annotated[int, Field(ge=1)] | None = None
    standardize_by: PixelStatistics | None = None
    teachers: tuple[str, ...] = ()

    @field_validator("teachers", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # JSON has lists

    @model_validator(mode="after")
    def _check_teachers(self) -> Self:
        if self.teachers and not self.recipe.distill:
            raise ValueError(
                "a teacher sets the soft labels of fine-tuning, and distill, their temperature, is "
                "0; set distill"
            )
        return self

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.recipe.method

    def to_dict(self) -> dict[str, Any]:
        """The request as plain values for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"method": self.method, **values, "recipe": self.recipe.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """The request from the values that `to_dict` returned. Unknown keys are ignored.

        Raises:
            RequestError: a value is missing, has a wrong type or is out of its bounds.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {key: value for key, value in values.items() if key in fields}
        method, recipe = values.get("method"), values.get("recipe")
        if method not in RECIPE_CLASSES:
            raise RequestError(f"method is {method!r}; expected {', '.join(RECIPE_CLASSES)}")
        if not isinstance(recipe, Mapping):
            raise RequestError(f"recipe is {recipe!r}; expected settings by name")
        return cls(**{**known, "recipe": RECIPE_CLASSES[method].from_dict(recipe, "the recipe")})
