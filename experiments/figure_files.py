"""The files of a figure, which contain a hash of the numbers that it was drawn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sbp.errors import RequestError
from pyro_sbp.reports.plots.style import svg
from pyro_sbp.training.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["describe", "out_of_date", "write_figure"]


def describe(subject: str, numbers: Any) -> str:
    """The description of a figure in the metadata of its files.

    It contains a hash of the numbers, so that it does not depend on the style and on Matplotlib.

    Args:
        subject: what the figure shows.
        numbers: what it is drawn from, as for `json.dumps`.
    """
    text = json.dumps(numbers, sort_keys=True)
    return f"{subject}; data {hashlib.sha256(text.encode()).hexdigest()}"


def out_of_date(root: Path, names: Iterable[str], description: str) -> list[str]:
    """The files that are missing, or were drawn from other numbers.

    Args:
        root: the directory of the checkout.
        names: the files, relative to it.
        description: the description of the current numbers.
    """
    paths = {name: root / name for name in names}
    return [
        name
        for name, path in paths.items()
        if not path.is_file() or description not in path.read_text("utf-8")
    ]


def write_figure(path: Path, figure: Figure, description: str) -> None:
    """Write a figure as SVG.

    Raises:
        RequestError: the file cannot be written.
    """
    try:
        write_whole(path, svg(figure, description))
    except OSError as error:
        raise RequestError(str(error)) from error
