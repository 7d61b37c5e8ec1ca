"""Errors of wrong requests and of runs on several processes, and the texts of messages."""

import difflib
import json
import pickle
import zipfile
from collections.abc import Iterable

from pyro_sbp.deprecation import renamed_names

__all__ = [
    "OtherProcessError",
    "RequestError",
    "SingleProcessError",
    "damage",
    "did_you_mean",
    "first_line",
    "unknown",
]


class RequestError(ValueError):
    """The request is wrong. The message is one line: what is wrong and what is expected."""


class SingleProcessError(Exception):
    """A failure of one process of a run. Only that process can report the cause."""


class OtherProcessError(RuntimeError):
    """Another process of the run has failed. It reports the cause, unless it was killed."""

    def __init__(self, message: str = "another process of this run has ended") -> None:
        super().__init__(message)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A hint for an unknown word: the most similar name, or an empty string if none is similar."""
    spelled = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), spelled, 1)
    return f"; did you mean {spelled[close[0]]!r}?" if close else ""


def unknown(kind: str, word: str, names: Iterable[str], others: str = "", hint: str = "") -> str:
    """The message for an unknown word: first a hint, then everything that is expected.

    Args:
        kind: what the word should name, such as "arch".
        word: the unknown word.
        names: the known names.
        others: text that is appended to the names, for what is expected besides them.
        hint: replaces the hint of `did_you_mean`.
    """
    names = list(names)
    close = hint or did_you_mean(word, names)
    return f"unknown {kind} {word!r}{close or ';'} expected {', '.join(names)}{others}"


def damage(error: BaseException) -> str:
    """Describe what is wrong with a file, from the error that was raised when it was read."""
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
        # The message of torch advises reading the file unsafely.
        return "it contains more than tensors and plain values, and was not loaded"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of the message of an error, or its type if it has no message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


__getattr__ = renamed_names(
    __name__,
    {"Elsewhere": "OtherProcessError", "OfOneProcess": "SingleProcessError"},
    globals(),
)
