"""The directory in which `pyro-sbp train` writes a run."""

from __future__ import annotations

import os
from pathlib import Path

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.files import LOCK

__all__ = ["check_free", "default_directory", "hint_after_failure", "hint_at_once"]


def default_directory(request: Request) -> Path:
    """The run directory unless another is given, ``runs/ARCH-DATASET-METHOD``."""
    words = (request.arch, request.dataset, request.method)
    return Path("runs") / "-".join(word.replace("/", "_").replace(":", "_") for word in words)


def check_free(directory: Path) -> None:
    """Raise RequestError if a run cannot be written to a directory."""
    if directory.is_file():
        raise RequestError(f"{directory} is a file; give another --output-dir")
    if directory.exists() and any(path.name != LOCK for path in directory.iterdir()):
        hint = f"resume it with --resume {directory}, or " if _unfinished(directory) else ""
        if (directory / "summary.json").exists():
            hint = f"it contains a finished run (pyro-sbp inspect {directory} shows it); "
        raise RequestError(f"{directory} is not empty: {hint}give another --output-dir")
    parent = directory
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RequestError(f"cannot write {directory}: {parent} is not a writable directory")


def hint_after_failure(directory: Path) -> str:
    """What is appended to the message of an error; empty if there is nothing to resume."""
    return f"; resume with `pyro-sbp train --resume {directory}`" * _unfinished(directory)


def hint_at_once(directory: Path) -> str:
    """The message after a second signal."""
    if not _unfinished(directory):
        return "stopped at once"
    resume = f"pyro-sbp train --resume {directory}"
    if not (directory / "checkpoint.pt").exists():
        return f"stopped at once, before the first checkpoint; start again with `{resume}`"
    return f"stopped at once, without the steps since the last checkpoint; resume with `{resume}`"


def _unfinished(directory: Path) -> bool:
    return (directory / "recipe.json").exists() and not (directory / "summary.json").exists()
