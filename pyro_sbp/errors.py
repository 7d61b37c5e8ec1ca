"""The errors of wrong requests and of several processes, and the words of their messages."""

import difflib
import json
import pickle
import zipfile
from collections.abc import Iterable

__all__ = [
    "Elsewhere",
    "OfOneProcess",
    "RequestError",
    "damage",
    "did_you_mean",
    "first_line",
    "unknown",
]


class RequestError(ValueError):
    """The request is wrong; the message says in one line what is wrong and what would be right."""


class OfOneProcess(Exception):
    """A failure of one process of a run, which only that process can report."""


class Elsewhere(RuntimeError):
    """Another process of the run has failed; it reports the reason unless it was killed."""

    def __init__(self, message: str = "another process of this run has ended") -> None:
        super().__init__(message)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A hint for an unknown word: the name that it resembles, or an empty string."""
    spelled = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), spelled, 1)
    return f"; did you mean {spelled[close[0]]!r}?" if close else ""


def unknown(kind: str, word: str, names: Iterable[str], others: str = "", hint: str = "") -> str:
    """The message about an unknown word: first a hint, then all that is expected.

    Args:
        kind: what the word should name.
        word: the word.
        names: the known names.
        others: what is expected besides the names.
        hint: takes the place of the hint that `did_you_mean` gives.
    """
    names = list(names)
    close = hint or did_you_mean(word, names)
    return f"unknown {kind} {word!r}{close or ';'} expected {', '.join(names)}{others}"


def damage(error: BaseException) -> str:
    """What is wrong with a file, from the error that reading it raised, in plain words."""
    if isinstance(error, EOFError):
        return "it is empty or cut off"
    if isinstance(error, zipfile.BadZipFile):
        return f"it is empty, cut off or not a zip archive ({first_line(error)})"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        if not error.doc.strip():
            return "it is empty"
        return "it is cut off" if error.pos >= len(error.doc.rstrip()) else f"not JSON: {error}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, pickle.UnpicklingError):
        # torch's message advises to read the file unsafely.
        return "it holds more than tensors and plain values, and was not loaded"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
