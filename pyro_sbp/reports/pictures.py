"""The figures of a page: each as SVG for light and for dark pages, and as a PNG file."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sbp.errors import RequestError
from pyro_sbp.reports import pages, plots
from pyro_sbp.reports.plots.style import lay_out
from pyro_sbp.training.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Pictures", "empty_folder"]

#: Dots per inch of the PNG files.
DPI = 150


def empty_folder(directory: Path) -> None:
    """Create the directory of the PNG files, or delete those of an earlier page.

    Raises:
        RequestError: the directory cannot be written.
    """
    try:
        directory.mkdir(exist_ok=True)
        for old in directory.glob("*.png"):
            old.unlink()
    except OSError as error:
        raise RequestError(f"cannot write {directory}: {error.strerror}") from error


@dataclass(frozen=True)
class Pictures:
    """Draws figures for the page, and writes them as PNG files into a directory.

    Attributes:
        directory: the directory, which exists.
        prefix: the start of the names of the files.
    """

    directory: Path
    prefix: str = ""

    def __call__(self, name: str, draw: Callable[..., Figure], words: str, *args: Any) -> str:
        """A figure in HTML, or a line that says why there is none.

        Args:
            name: the name of the file, without prefix and suffix.
            draw: a function of `plots`.
            words: the alternative text.
            args: the arguments of the function.
        """
        try:
            light, dark = draw(*args), draw(*args, dark=True)
        except RequestError as error:
            return pages.paragraph(f"No picture: {error}.", "soft")
        lay_out(light, dark)
        png = io.BytesIO()
        light.savefig(png, dpi=DPI, format="png")
        write_whole(self.directory / f"{self.prefix}{name}.png", png.getvalue())
        return pages.picture(plots.svg(light), plots.svg(dark), words)
