"""The fields of recipes: types with bounds, and a field with its description. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

__all__ = ["Count", "Factor", "Fraction", "Positive", "Rate", "Share", "setting"]

Count = Annotated[int, Field(ge=0, le=1_000_000)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
#: A share that is not the whole.
Fraction = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(ge=0, le=1e6)]


def setting(default: Any, description: str) -> Any:
    """A field with a default and a description."""
    return Field(default, description=description)
