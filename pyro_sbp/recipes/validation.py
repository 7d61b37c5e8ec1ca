"""Strict validation of dataclasses by pydantic, with messages of one line. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pydantic
from pydantic import ValidationError

from pyro_sbp.errors import RequestError

__all__ = ["STRICT", "in_one_line", "refusing"]

STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

#: Phrases in the messages of pydantic, and the phrases that replace them.
_WORDS = {
    "greater than or equal to ": "a number >= ",
    "less than or equal to ": "a number <= ",
    "greater than ": "a number > ",
    "less than ": "a number < ",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "a string",
}


def in_one_line(error: ValidationError) -> str:
    """The first error of a validation, as ``NAME is VALUE; expected ...``."""
    found = error.errors(include_url=False)[0]
    name = " ".join(str(part) for part in found["loc"])
    if found["type"] == "missing":
        return f"{name} is missing"
    if found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"there is no setting {name!r}"
    message = found["msg"].removeprefix("Value error, ")
    integer = any(type(limit) is int for limit in found.get("ctx", {}).values())
    if name == "threshold" and found["type"] == "less_than_equal":
        message += ", the largest signal-to-noise ratio that a posterior can reach"
    if message.startswith("Input should be "):
        expected = message.removeprefix("Input should be ")
        for words, ours in _WORDS.items():
            if expected.startswith(words):
                expected = ours + expected.removeprefix(words)
        if integer:  # pydantic gives the limits of integers as integers
            expected = expected.replace("a number", "an integer")
        message = f"expected {expected}"
    return f"{name} is {found['input']!r}; {message}" if name else message


_Class = TypeVar("_Class", bound=type)


def refusing(cls: _Class) -> _Class:
    """Make the constructor of a validated dataclass raise `RequestError` with a message of one
    line.
    """
    validate: Callable[..., None] = cls.__init__  # type: ignore[misc]  # of a class that is known

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            validate(self, *args, **kwargs)
        except ValidationError as error:
            raise RequestError(in_one_line(error)) from error

    cls.__init__ = __init__  # type: ignore[misc]  # as above
    return cls
