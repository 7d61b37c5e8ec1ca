"""Print the warnings of a command as single lines."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from typing import TextIO

__all__ = ["print_warnings_as_lines"]

#: The text that torch appends to its warnings: the source file of torch that raised them.
_ORIGIN = re.compile(r" \(Triggered internally at [^()]*\)$")


def print_warnings_as_lines() -> None:
    """Print each later warning of this process as one line, ``Warning: ...``, on stderr.

    By default, Python prints the file, the line number, the category and a line of source code.
    """
    warnings.showwarning = _print_line


def _print_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """`warnings.showwarning`, whose arguments these are."""
    words = " ".join(str(message).split())
    words = _ORIGIN.sub("", words.removesuffix(".")) or category.__name__
    target = file or sys.stderr
    if target is None:  # the program has no stderr, as under pythonw
        return
    with contextlib.suppress(OSError):  # stderr may be closed; the command must continue
        target.write(f"Warning: {words}\n")
