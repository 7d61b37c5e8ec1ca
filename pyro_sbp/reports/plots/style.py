"""The style of the plots, and the functions that they share."""

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


__all__ = ["check_matplotlib", "lay_out", "svg"]


#: The colours of Okabe and Ito, which colour-blind readers can distinguish, most visible first.
LIGHT_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


DARK_CYCLE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442")


#: The background and the text colour of a light and of a dark page.
LIGHT_PAGE, DARK_PAGE = ("#ffffff", "#22262b"), ("#16191d", "#e4e6e9")


#: The colour of removed units, on both kinds of page.
REMOVED = "#8a8f98"


#: Inches. A phone shows a figure of this width with readable text.
WIDTH = 5.2


#: The largest number of gates, layers and filters in one figure; those with most units come first.
MOST_GATES, MOST_LAYERS, MOST_FILTERS = 32, 40, 64


def check_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        RequestError: Matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise RequestError("pictures need one more package: pip install 'pyro-sbp[report]'")


def drawing(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a function that returns a figure: it gets the argument `dark`, and draws in the
    style of a light or a dark page."""

    @functools.wraps(function)
    def draw(*args: Any, dark: bool = False, **kwargs: Any) -> Figure:
        check_matplotlib()
        import matplotlib
        from matplotlib.rcsetup import cycler

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
    # pyplot is not used, because it keeps every figure in memory until it is closed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def lay_out(figure: Figure, *twins: Figure) -> None:
    """Place the axes of a figure, and those of its twins in the same way.

    Otherwise each file of a figure computes the layout again, which takes most of its time.

    Args:
        figure: a figure from `new_figure`.
        twins: the same figure in other colours.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine(None)
    for twin in twins:
        twin.set_layout_engine(None)
        for ax, other in zip(figure.axes, twin.axes, strict=True):
            other.set_position(ax.get_position(original=True))
        # Titles and labels of the whole figure.
        for text, other_text in zip(figure.texts, twin.texts, strict=True):
            other_text.set_position(text.get_position())


def svg(figure: Figure, description: str | None = None) -> bytes:
    """A figure as SVG. The bytes depend only on the figure and the version of Matplotlib.

    Args:
        description: a description for the metadata of the file.
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
    """Label the ticks of an axis with plain numbers, without powers of ten."""
    axis.set_major_formatter("{x:,.10g}")


def minor_ticks(axis: Any) -> None:
    """Label some numbers between the powers of ten, if an axis has few powers of ten."""
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


def draw_bars(
    ax: Any, names: Sequence[str], bars: Mapping[str, Sequence[float]], unit: str = ""
) -> None:
    """Draw bars side by side on a logarithmic axis, with the first name at the top.

    Args:
        ax: the axes.
        names: the names of the groups of bars.
        bars: for each label of the legend, one value per name.
        unit: the unit of the values. Values are written with three digits and a prefix: 20k, 1.6M,
            94 µs.
    """
    from matplotlib.ticker import EngFormatter

    engineering = EngFormatter(unit=unit, sep=" " if unit else "")

    def short(value: float) -> str:
        return engineering(float(f"{value:.3g}")) if math.isfinite(value) else f"{value}"

    height = 0.8 / len(bars)
    for index, (label, values) in enumerate(bars.items()):
        places = [i + (index - (len(bars) - 1) / 2) * height for i in range(len(names))]
        widths = [value if math.isfinite(value) else 0 for value in values]
        drawn = ax.barh(places, widths, 0.92 * height, label=label, color=color_cycle()[index])
        ax.bar_label(drawn, [short(value) for value in values], padding=2, fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    positive = [v for values in bars.values() for v in values if 0 < v < math.inf]
    if positive:
        ax.set_xscale("log")
        # Extend the axis at its end for the labels, and at its start to show the shortest bar.
        span = max(positive) / min(positive)
        ax.set_xlim(min(positive) / max(span**0.15, 1.5), max(positive) * max(span**0.25, 1.7))
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(lambda value, _: short(value))


def most_shown(shown: int, total: int, what: str) -> str | None:
    """A text that says how many elements a figure shows; None if it shows all."""
    return f"the largest {shown} of {total} {what}" if shown < total else None
