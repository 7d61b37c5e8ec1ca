"""The look of the pictures, and what they share."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sbp.errors import RequestError
from pyro_sbp.training.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType


__all__ = ["check_matplotlib", "svg"]


#: Okabe and Ito's colours, which the colour-blind tell apart: first those that stand out most.
LIGHT_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


DARK_CYCLE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442")


#: The background and the ink of a page, light and dark.
LIGHT_PAGE, DARK_PAGE = ("#ffffff", "#22262b"), ("#16191d", "#e4e6e9")


#: What has been removed, on either page.
REMOVED = "#8a8f98"


#: Inches; a picture is as wide as a phone shows it without making its letters much smaller.
WIDTH = 5.2


#: The most gates, layers and filters that one picture shows; those of the most units come first.
MOST_GATES, MOST_LAYERS, MOST_FILTERS = 32, 40, 64


def check_matplotlib() -> None:
    """See that pictures can be drawn.

    Raises:
        RequestError: Matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise RequestError("pictures need one more package: pip install 'pyro-sbp[report]'")


def drawing(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the style of a light or a dark page."""

    @functools.wraps(function)
    def draw(*args: Any, dark: bool = False, **kwargs: Any) -> Figure:
        check_matplotlib()
        import matplotlib
        from cycler import cycler

        page, ink = DARK_PAGE if dark else LIGHT_PAGE
        style: dict[RcKeyType, Any] = {
            "axes.prop_cycle": cycler(color=DARK_CYCLE if dark else LIGHT_CYCLE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.grid": False,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "font.size": 10,
            "legend.frameon": False,
            "grid.alpha": 0.25,
            "figure.facecolor": page,
            "axes.facecolor": page,
            "text.color": ink,
            "axes.edgecolor": ink,
            "axes.labelcolor": ink,
            "xtick.color": ink,
            "ytick.color": ink,
        }
        with matplotlib.rc_context(style):
            return function(*args, **kwargs)

    return draw


def new_figure(
    height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **kwargs: Any
) -> tuple[Figure, Any]:
    """A figure, and its axes as an array ``[rows, columns]``."""
    # Not from pyplot, which keeps every figure until it is closed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def svg(figure: Figure, description: str | None = None) -> bytes:
    """A figure as SVG, of the same bytes for the same figure and Matplotlib.

    Args:
        description: words for the file's metadata.
    """
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "pyro-sbp"}):
        metadata = {"Date": None, "Description": description}
        figure.savefig(content, format="svg", metadata=metadata)
    return content.getvalue()


def run_of(source: Run | str | Path) -> Run:
    return source if isinstance(source, Run) else Run.read(source)


def plain_ticks(axis: Any) -> None:
    """Numbers as they are written in a text, on a logarithmic axis too."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def minor_ticks(axis: Any) -> None:
    """Name some numbers between the powers of ten, where an axis has few of these."""
    from matplotlib.ticker import FuncFormatter

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    named = (2, 3, 5) if decades < 1.4 else (2, 5) if decades < 2.2 else ()

    def word(value: float, _: Any) -> str:
        first = round(value / 10 ** math.floor(math.log10(value)))
        return f"{value:,.10g}" if first in named else ""

    axis.set_minor_formatter(FuncFormatter(word))


def color_cycle() -> list[str]:
    import matplotlib

    return matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]


def _short(value: float) -> str:
    """A number in few letters: 20k, 1.6M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def draw_bars(ax: Any, names: Sequence[str], bars: Mapping[str, Sequence[float]]) -> None:
    """Bars side by side on a logarithmic axis, the first name on top."""
    height = 0.8 / len(bars)
    for index, (label, values) in enumerate(bars.items()):
        places = [i + (index - (len(bars) - 1) / 2) * height for i in range(len(names))]
        drawn = ax.barh(places, values, 0.92 * height, label=label, color=color_cycle()[index])
        ax.bar_label(drawn, [_short(value) for value in values], padding=2,
                     fontsize=8)  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xscale("log")
    positive = [value for values in bars.values() for value in values if value > 0] or [1]
    # Room for the labels; the shortest bar is still one.
    span = max(positive) / min(positive)
    ax.set_xlim(min(positive) / max(span**0.15, 1.5), max(positive) * max(span**0.25, 1.7))
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(lambda value, _: _short(value))


def most_shown(shown: int, total: int, what: str) -> str | None:
    """That a picture leaves some out, where it does."""
    return f"the largest {shown} of {total} {what}" if shown < total else None
