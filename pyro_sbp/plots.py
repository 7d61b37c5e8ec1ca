"""Pictures of a run, as Matplotlib figures.

Every function takes `dark=True` for a dark background, and raises `RequestError` where Matplotlib
is missing or the run has nothing to draw. A notebook shows the figures once it has imported
`matplotlib.pyplot`.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sbp.architectures import ARCHITECTURES
from pyro_sbp.errors import RequestError
from pyro_sbp.published import published
from pyro_sbp.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from pyro_sbp.posterior import Posterior

__all__ = [
    "Point",
    "check_matplotlib",
    "draw_frontier",
    "error_against_macs",
    "error_against_threshold",
    "first_filters",
    "frontier",
    "image_shape",
    "kept_pixels",
    "latency",
    "layer_costs",
    "published_points",
    "snr_histograms",
    "svg",
    "training_curves",
]

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
#: The points of a frontier: marker, colour of the cycle, filling and size.
KINDS = {
    "published": ("s", 1, "full", 6),
    "pyro-sbp": ("o", 0, "full", 8),
    "before pruning": ("o", 0, "none", 6),
    "baselines": ("^", 2, "full", 7),
}


def check_matplotlib() -> None:
    """See that pictures can be drawn.

    Raises:
        RequestError: Matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise RequestError("pictures need one more package: pip install 'pyro-sbp[report]'")


def _draws(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the style of a light or a dark page."""

    @functools.wraps(function)
    def draw(*args: Any, dark: bool = False, **kwargs: Any) -> Figure:
        check_matplotlib()
        import matplotlib
        from cycler import cycler

        page, ink = DARK_PAGE if dark else LIGHT_PAGE
        style = {
            "axes.prop_cycle": cycler(color=DARK_CYCLE if dark else LIGHT_CYCLE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.grid": False,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "font.size": 10,
            "legend.frameon": False,
            "grid.alpha": 0.25,
            **dict.fromkeys(("figure.facecolor", "axes.facecolor"), page),
            **dict.fromkeys(
                ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"),
                ink,
            ),
        }
        with matplotlib.rc_context(style):
            return function(*args, **kwargs)

    return draw


def _figure(
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


def _run(source: Run | str | Path) -> Run:
    return source if isinstance(source, Run) else Run.read(source)


def _plain(axis: Any) -> None:
    """Numbers as they are written in a text, on a logarithmic axis too."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _minor(axis: Any) -> None:
    """Name some numbers between the powers of ten, where an axis has few of these."""
    from matplotlib.ticker import FuncFormatter

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    named = (2, 3, 5) if decades < 1.4 else (2, 5) if decades < 2.2 else ()

    def word(value: float, _: Any) -> str:
        first = round(value / 10 ** math.floor(math.log10(value)))
        return f"{value:,.10g}" if first in named else ""

    axis.set_minor_formatter(FuncFormatter(word))


def _posterior(source: Any, threshold: float | None) -> tuple[Any, float]:
    """The posterior of a run, or anything that has signal-to-noise ratios, and the threshold."""
    if isinstance(source, Run | str | Path):
        from pyro_sbp.posterior import read_posterior

        run = _run(source)
        threshold = run.request.recipe.threshold if threshold is None else threshold
        source = read_posterior(run.directory)
    return source, 1.0 if threshold is None else threshold


@_draws
def snr_histograms(source: Any, threshold: float | None = None) -> Figure:
    """How many units of each gate have which signal-to-noise ratio, both axes logarithmic.

    Args:
        source: a run, its directory, its posterior, or a guide.
        threshold: where kept units begin; by default that of the run's recipe, or 1.
    """
    source, threshold = _posterior(source, threshold)
    snr = {name: value.detach().flatten().cpu().double() for name, value in source.snr().items()}
    names = sorted(snr, key=lambda name: -len(snr[name]))[:MOST_GATES]
    names = [name for name in snr if name in names]
    columns = 1 if len(names) <= 8 else 2
    rows = math.ceil(len(names) / columns)
    figure, axes = _figure(0.7 + 1.15 * rows, rows, columns, sharex=True)
    least = min(float(value.min()) for value in snr.values())
    most = max(float(value.max()) for value in snr.values())
    edges = _edges(min(least, 0.9 * threshold), max(most, 1.1 * threshold), threshold)
    colors = _cycle()
    for ax, name in zip(axes.flat, names, strict=False):
        values = snr[name]
        kept, removed = values[values >= threshold], values[values < threshold]
        for color, part in ((REMOVED, removed), (colors[0], kept)):
            ax.hist(part.numpy(), bins=edges, color=color)
        ax.axvline(threshold, color=colors[1], linestyle="--")
        ax.set(xscale="log", yscale="log")
        ax.set_ylim(0.5, None)
        words = f"{name}: {len(kept)} of {len(values)}"
        words += f" at or over {threshold:.3g}" if columns == 1 else ""
        ax.set_title(words, fontsize=9 if columns == 1 else 8)
        _plain(ax.xaxis)
        _plain(ax.yaxis)
    for ax in list(axes.flat)[len(names) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        _minor(ax.xaxis)
    left_out = _of(len(names), len(snr), "gates")
    if left_out:
        figure.suptitle(left_out, fontsize=9)
    figure.supxlabel("signal-to-noise ratio", fontsize=10)
    figure.supylabel(getattr(source, "elements", "units"), fontsize=10)
    return figure


def _edges(low: float, high: float, threshold: float, bins: int = 40) -> list[float]:
    """Edges of equal width on a logarithmic axis, one of which is the threshold."""
    if threshold <= 0:
        return [low * (high / low) ** (i / bins) for i in range(bins)] + [high * 1.001]
    width = math.log(high / low) / bins
    below = math.ceil(math.log(threshold / low) / width)
    above = math.floor(math.log(high / threshold) / width) + 1
    return [threshold * math.exp(i * width) for i in range(-below, above + 1)]


@_draws
def training_curves(source: Run | str | Path) -> Figure:
    """Loss, NLL and KL, test error, and the share of units left, over the epochs of all phases."""
    run = _run(source)
    if not run.metrics:
        raise RequestError(f"{run.directory} has no epoch in metrics.jsonl yet")
    lines, epochs = run.metrics, range(1, len(run.metrics) + 1)
    figure, axes = _figure(6.2, 3, sharex=True)
    loss, error, units = axes[:, 0]
    marker = "." if len(lines) < 40 else ""
    kl = [line.get("weighted_kl", line["kl"]) for line in lines]
    for label, values, style in (
        ("loss", [line["loss"] for line in lines], "-"),
        ("NLL", [line["nll"] for line in lines], "--"),
        ("KL, as the loss weighs it", kl, ":"),
    ):
        positive = [value if value > 0 else math.nan for value in values]
        if not all(map(math.isnan, positive)):
            loss.plot(epochs, positive, style, label=label, marker=marker)
    loss.set_yscale("log")
    loss.set_ylabel("nats per example")
    loss.legend(fontsize=9)
    error.plot(epochs, [line["error"] for line in lines], marker=marker)
    _error_axis(error, [line["error"] for line in lines])
    totals = _totals(run)
    names = sorted(totals, key=lambda name: -totals[name])[: len(LIGHT_CYCLE) * 2]
    for index, name in enumerate(name for name in totals if name in names):
        share = [100 * line["units"].get(name, math.nan) / totals[name] for line in lines]
        style = "-" if index < len(LIGHT_CYCLE) else "--"
        units.plot(epochs, share, style, label=name, marker=marker)
    units.set(ylabel="units left, %", xlabel="epoch", ylim=(0, 105))
    units.legend(fontsize=9, ncols=2, title=_of(len(names), len(totals), "gates"))
    _plain(loss.yaxis)
    units.set_xlim(0.5 - 0.02 * len(lines), len(lines) + 0.5)
    units.xaxis.get_major_locator().set_params(integer=True)
    start = 0
    phases = dict.fromkeys(line["phase"] for line in lines)
    tilt = 30 if len(phases) > 4 else 0  # the turns of RBP are many, and their names long
    place: dict[str, Any] = {"transform": loss.get_xaxis_transform(), "fontsize": 9}
    for phase in phases:
        count = sum(line["phase"] == phase for line in lines)
        loss.text(start + 0.6, 1.02, phase, rotation=tilt, **place)
        for ax in axes[:, 0] if start else ():
            ax.axvline(start + 0.5, color="gray", linewidth=0.8, linestyle=":")
        start += count
    return figure


def _error_axis(ax: Any, errors: Sequence[float]) -> None:
    """Logarithmic where errors differ much."""
    if min(errors) > 0 and max(errors) > 5 * min(errors):
        ax.set_yscale("log")
        _plain(ax.yaxis)
        _minor(ax.yaxis)
    ax.set_ylabel("test error, %")


def _totals(run: Run) -> dict[str, int]:
    """The units of every gate at the start."""
    if run.summary is not None:
        return {unit["gate"]: unit["total"] for unit in run.summary["units"]}
    # The most ever seen: of a run that started with noise, what had gone in its first epoch is not.
    totals: dict[str, int] = {}
    for line in run.metrics:
        for name, count in line["units"].items():
            totals[name] = max(totals.get(name, 1), count)
    return totals


@_draws
def error_against_threshold(rows: Sequence[Mapping[str, Any]], threshold: float = 1.0) -> Figure:
    """Error at other thresholds, of the images that the sweep was measured on.

    Args:
        rows: from `sweep`.
        threshold: that of the recipe, which is marked.
    """
    figure, axes = _figure(3.2)
    ax = axes[0, 0]
    # A logarithmic axis has no place for zero.
    rows = [row for row in rows if row["threshold"] > 0]
    _sweep_line(ax, rows, "threshold", threshold)
    ax.set(xscale="log", xlabel="threshold on the signal-to-noise ratio")
    _plain(ax.xaxis)
    _minor(ax.xaxis)
    return figure


@_draws
def error_against_macs(rows: Sequence[Mapping[str, Any]], threshold: float = 1.0) -> Figure:
    """Error against how many times fewer MACs, at other thresholds; arguments as above."""
    figure, axes = _figure(3.2)
    ax = axes[0, 0]
    _sweep_line(ax, rows, "ratio", threshold)
    ax.set(xscale="log", xlabel="times fewer MACs")
    _plain(ax.xaxis)
    _minor(ax.xaxis)
    return figure


def _sweep_line(
    ax: Any, rows: Sequence[Mapping[str, Any]], quantity: str, threshold: float
) -> None:
    if not rows:
        raise RequestError("the sweep has no threshold that can be drawn")
    ax.plot([row[quantity] for row in rows], [row["error"] for row in rows], marker="o")
    mine = [row for row in rows if row["threshold"] == threshold]
    if mine:
        label = f"the recipe's threshold, {threshold:g}"
        ax.plot(
            mine[0][quantity], mine[0]["error"], "D", color=_cycle()[1], markersize=9, label=label
        )
        ax.legend(fontsize=9)
    _error_axis(ax, [row["error"] for row in rows])
    ax.set_ylabel(f"{rows[0]['split']} error, %")


@_draws
def layer_costs(source: Run | str | Path, costs: Mapping[str, Any] | None = None) -> Figure:
    """MACs and parameters of every layer that multiplies, before and after; logarithmic axes.

    Args:
        source: a finished run or its directory.
        costs: from `costs_of`, where they are at hand.
    """
    from pyro_sbp.findings import costs_of

    costs = costs_of(_run(source)) if costs is None else costs
    # Norms multiply nothing, and have few parameters.
    costs = {name: cost for name, cost in costs.items() if cost["dense"][0]}
    names = sorted(costs, key=lambda name: -costs[name]["dense"][0])[:MOST_LAYERS]
    names = [name for name in costs if name in names]
    figure, axes = _figure(1.6 + 0.75 * len(names), 2, sharey=True)
    for index, (ax, label) in enumerate(zip(axes[:, 0], ("MACs", "parameters"), strict=True)):
        bars = {part: [costs[name][part][index] for name in names] for part in ("dense", "pruned")}
        _bars(ax, [name or "elsewhere" for name in names], bars)
        ax.set_xlabel(label)
    title = _of(len(names), len(costs), "layers")
    axes[0, 0].legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, title=title)
    return figure


def _of(shown: int, total: int, what: str) -> str | None:
    """That a picture leaves some out, where it does."""
    return f"the largest {shown} of {total} {what}" if shown < total else None


def _bars(ax: Any, names: Sequence[str], bars: Mapping[str, Sequence[float]]) -> None:
    """Bars side by side on a logarithmic axis, the first name on top."""
    height = 0.8 / len(bars)
    for index, (label, values) in enumerate(bars.items()):
        places = [i + (index - (len(bars) - 1) / 2) * height for i in range(len(names))]
        drawn = ax.barh(places, values, 0.92 * height, label=label, color=_cycle()[index])
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


def _short(value: float) -> str:
    """A number in few letters: 20k, 1.6M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


@_draws
def latency(source: Run | str | Path) -> Figure:
    """Milliseconds a call of the dense and the pruned network, from `bench.json`."""
    run = _run(source)
    if not run.bench:
        raise RequestError(
            f"{run.directory} has no bench.json; make it by pyro-sbp bench {run.directory}"
        )
    rows = run.bench
    several = any(row["runtime"] != "eager" for row in rows)
    names = [
        f"{'GPU' if row['device'].startswith('cuda') else 'CPU'}, batch {row['batch_size']}"
        + ("" if row["device"].startswith("cuda") else f",\n{_threads(row['threads'])}")
        + (f",\n{row['runtime']}" if several else "")
        for row in rows
    ]
    bars = {
        "dense": [row["dense_ms"] for row in rows],
        "pruned": [row["pruned_ms"] for row in rows],
    }
    if all(row.get("floor_ms") for row in rows):
        bars["one unit a gate"] = [row["floor_ms"] for row in rows]
    figure, axes = _figure(1.1 + 0.7 * len(rows))
    _bars(axes[0, 0], names, bars)
    axes[0, 0].set_xlabel("ms a call, median")
    axes[0, 0].legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return figure


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def image_shape(run: Run) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that a run's network takes, where they are known."""
    if run.network is not None and len(run.network.get("input_shape") or ()) == 3:
        channels, height, width = run.network["input_shape"]
        return channels, height, width
    known = ARCHITECTURES.get(run.request.arch)
    if known is None or known.image_size is None:
        return None
    return (3 if known.dataset == "cifar10" else 1), known.image_size, known.image_size


def pixel_snr(run: Run, posterior: Posterior) -> tuple[str, Tensor] | None:
    """The site that says what the pixels of the image carry, and their signal-to-noise ratios
    ``[channels, height, width]``: of noise on weights, the best of those that read a pixel."""
    shape = image_shape(run)
    if shape is None:
        return None
    for name, value in posterior.snr().items():
        if posterior.elements == "weights" and value.ndim == 2:
            value = value.amax(0)
        elif not name.endswith("_input"):
            continue
        if value.numel() == math.prod(shape):
            return name, value.detach().double().cpu().reshape(shape)
    return None


@_draws
def kept_pixels(source: Run | str | Path) -> Figure:
    """The signal-to-noise ratio of the pixels of the image, and which pixels are kept.

    Of an image with several channels, the largest ratio of each pixel.
    """
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    run = _run(source)
    posterior, threshold = _posterior(run, None)
    found = pixel_snr(run, posterior)
    if found is None:
        raise RequestError(f"{run.directory} has no noise on the pixels of its images")
    name, snr = found
    values = snr.amax(0).numpy()
    figure, axes = _figure(3.0, 1, 2)
    left, right = axes[0]
    shown = left.imshow(values, cmap="cividis", norm=LogNorm())
    left.set_title(f"SNR of {name}", fontsize=9)
    bar = figure.colorbar(shown, cax=left.inset_axes((0, -0.12, 1, 0.05)), orientation="horizontal")
    ticks = [tick for tick in (0.02, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick <= values.max()]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()
    colors = (REMOVED, _cycle()[0])
    right.imshow(values >= threshold, cmap=ListedColormap(colors), vmin=0, vmax=1)
    kept = int((snr >= threshold).sum())
    right.set_title(f"{kept} of {snr.numel()} kept", fontsize=9)
    handles = [
        Patch(color=color, label=word)
        for color, word in zip(colors, ("removed", "kept"), strict=True)
    ]
    right.legend(handles=handles, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.04),
                 ncols=2)  # fmt: skip
    for ax in axes[0]:
        ax.set(xticks=[], yticks=[])
    return figure


def _cycle() -> list[str]:
    import matplotlib

    return matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]


def _rows_left(run: Run, gate: str, size: int, rows: int) -> dict[int, int]:
    """From the units of a gate to the rows of its writer, which RBP has cut before."""
    if rows == size:
        return {unit: unit for unit in range(size)}
    left = sorted(run.units[gate]["kept"] + run.units[gate]["zeroed"]) if run.units else []
    if len(left) != rows:
        raise RequestError(f"which filters of {gate} are left is told when the run has finished")
    return {unit: row for row, unit in enumerate(left)}


@_draws
def first_filters(source: Run | str | Path) -> Figure:
    """The filters of the first convolution that are kept, with their signal-to-noise ratios."""
    import torch

    from pyro_sbp.posterior import read_posterior

    run = _run(source)
    posterior, shape = read_posterior(run.directory), image_shape(run)
    threshold = run.request.recipe.threshold
    # Of noise on weights, the best of a filter's.
    snr = {n: v.flatten(1).amax(1) if v.ndim > 1 else v for n, v in posterior.snr().items()}
    found = [
        (name.removesuffix(".weight"), value)
        for name, value in posterior.weights.items()
        if value.ndim == 4 and name.endswith(".weight")
    ]
    if not found or found[0][0] not in snr or not shape or found[0][1].shape[1] != shape[0]:
        raise RequestError(f"{run.directory} has no noise on a first convolution")
    name, weight = found[0]
    if shape[0] not in (1, 3) or weight.shape[-1] == 1:
        raise RequestError(f"the filters of {name} are no pictures of one or three channels")
    row = _rows_left(run, name, len(snr[name]), len(weight))
    left = torch.tensor(list(row))
    over = left[snr[name][left] >= threshold]
    order = over[snr[name][over].argsort(descending=True)][:MOST_FILTERS].tolist()
    if not order:
        raise RequestError(f"no filter of {name} reaches the threshold {threshold:g}")
    columns = min(8, len(order))
    rows = math.ceil(len(order) / columns)
    figure, axes = _figure(0.6 + 0.85 * rows, rows, columns)
    scale = float(weight[[row[unit] for unit in order]].abs().max())
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, unit in zip(axes.flat, order, strict=False):
        picture = weight[row[unit]].float()
        if shape[0] == 1:
            ax.imshow(picture[0].numpy(), cmap="PuOr", vmin=-scale, vmax=scale)
        else:
            ax.imshow((0.5 + 0.5 * picture / scale).clamp(0, 1).permute(1, 2, 0).numpy())
        ax.set_title(f"{unit}: {float(snr[name][unit]):.3g}", fontsize=8, loc="center")
    more = f", the best {len(order)}" if len(order) < len(over) else ""
    figure.suptitle(
        f"{name}: {len(over)} of {len(snr[name])} filters kept{more}; unit: SNR", fontsize=9
    )
    return figure


@dataclass(frozen=True)
class Point:
    """A network of a frontier.

    Attributes:
        kind: a key of `KINDS`.
        name: what is written beside it; may be empty.
        macs_ratio: how many times fewer MACs than the dense network.
        error: test error in percent.
        spread: the least and the greatest of the errors that `error` is the median of.
    """

    kind: str
    name: str
    macs_ratio: float
    error: float
    spread: tuple[float, float] | None = None


def frontier(sources: Sequence[Run | str | Path], dark: bool = False) -> Figure:
    """Test error against how many times fewer MACs: finished runs, and what papers report.

    A panel for each pair of network and data set.

    Raises:
        RequestError: no run has finished.
    """
    panels: dict[tuple[str, str], list[Point]] = {}
    for run in map(_run, sources):
        if run.summary is None:
            continue
        pair = (run.request.arch, run.request.dataset)
        points = panels.setdefault(pair, published_points(*pair))
        points.append(Point("pyro-sbp", run.name, run.macs_ratio, run.error))
        if run.summary["error"]["dense"] is not None:
            points.append(Point("before pruning", "", 1, run.summary["error"]["dense"]))
    if not panels:
        raise RequestError("no run has finished")
    titled = {f"{arch} on {dataset}": points for (arch, dataset), points in panels.items()}
    return draw_frontier(titled, dark=dark)


def published_points(arch: str, dataset: str) -> list[Point]:
    """What papers report of a network, as points of its frontier."""
    return [
        Point("published", paper.method, paper.macs_ratio, paper.error)
        for paper in published(arch, dataset)
    ]


@_draws
def draw_frontier(panels: Mapping[str, Sequence[Point]], columns: int = 1) -> Figure:
    """Test error against times fewer MACs, the latter logarithmic.

    Args:
        panels: the points of every panel, by its title; at least one point each.
        columns: how many panels stand side by side.
    """
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _figure(3.9 * rows, rows, columns, width=WIDTH * columns)
    for ax, (title, points) in zip(axes.flat, panels.items(), strict=False):
        labels = dict.fromkeys(point.kind for point in points)
        for point in points:
            marker, index, fill, size = KINDS[point.kind]
            style = {
                "color": _cycle()[index],
                "label": point.kind if point.kind in labels else None,
            }
            labels.pop(point.kind, None)
            ax.plot(point.macs_ratio, point.error, marker, fillstyle=fill, markersize=size, **style)
            if point.spread:
                ends = [[abs(end - point.error)] for end in point.spread]
                ax.errorbar(point.macs_ratio, point.error, ends, fmt="none", ecolor=style["color"])
        ax.set(xscale="log", xlabel="times fewer MACs", ylabel="test error, %", title=title)
        ax.set_xlim(0.9, max(point.macs_ratio for point in points) * 1.9)
        ax.margins(y=0.12)
        _name_points(ax, points)
        _plain(ax.xaxis)
        _minor(ax.xaxis)
        ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    return figure


def _name_points(ax: Any, points: Sequence[Point]) -> None:
    """Names beside points, moved up or down where they would lie on another."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    letter, line, marker = 0.0145, 0.045, 0.014  # of the axes, about
    places = [
        (
            math.log(point.macs_ratio / left) / math.log(right / left),
            (point.error - bottom) / (top - bottom),
        )
        for point in points
    ]
    taken = [(place - marker, place + marker, height) for place, height in places]
    named = ((at, point.name) for at, point in zip(places, points, strict=True) if point.name)
    for (place, height), name in sorted(named):
        place += 0.02
        for step in (0, 1, -1, 2, -2, 3, -3, 4, -4):
            at = height + step * line
            free = all(
                abs(at - other) >= line or place > end or place + letter * len(name) < begin
                for begin, end, other in taken
            )
            if free:
                break
        taken.append((place, place + letter * len(name), at))
        ax.text(place, at, name, transform=ax.transAxes, fontsize=7.5, va="center")
