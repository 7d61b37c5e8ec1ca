"""The errors of requests that cannot be met as they were made, and of several processes."""

import difflib
from collections.abc import Iterable

__all__ = ["Elsewhere", "OfOneProcess", "RequestError", "did_you_mean", "first_line"]


class RequestError(ValueError):
    """The request is wrong: the message says in one line what is, and what would be right."""


class OfOneProcess(Exception):
    """A failure that the other processes of a run know nothing of, so that this one has to tell."""


class Elsewhere(RuntimeError):
    """Another process of the run has failed, and told why unless it was killed."""

    def __init__(self, message: str = "another process of this run has ended") -> None:
        super().__init__(message)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The end of a refusal of an unknown word: the name that it is close to, or nothing."""
    spelled = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), spelled, 1)
    return f"; did you mean {spelled[close[0]]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
