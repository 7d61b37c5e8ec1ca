"""Plots of a posterior: signal-to-noise ratios, kept pixels, kept filters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sbp.architectures import ARCHITECTURES
from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.criteria import Rule, find_criterion
from pyro_sbp.reports.plots.style import (
    MOST_FILTERS,
    MOST_GATES,
    REMOVED,
    color_cycle,
    drawing,
    minor_ticks,
    most_shown,
    new_figure,
    plain_ticks,
    run_of,
)
from pyro_sbp.training.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from pyro_sbp.reports.posterior import Posterior

__all__ = ["first_filters", "image_shape", "kept_pixels", "snr_histograms"]


def _posterior(source: Any, threshold: float | None, criterion: str | None) -> tuple[Any, Rule]:
    """The posterior of a run, or anything that has signal-to-noise ratios, and what is kept."""
    if isinstance(source, Run | str | Path):
        from pyro_sbp.reports.posterior import read_posterior

        run = run_of(source)
        rule, source = run.request.recipe.rule(criterion), read_posterior(run.directory)
    else:
        found = find_criterion(criterion or "snr")
        rule = Rule(found, found.threshold)
    return source, rule if threshold is None else rule._replace(threshold=threshold)


def _by_snr(rule: Rule) -> bool:
    """Whether the threshold is a signal-to-noise ratio, so that it can be drawn on the axis."""
    return rule.criterion.name == "snr"


def _kept(source: Any, rule: Rule) -> dict[str, Tensor]:
    """Which elements of every site reach the threshold."""
    scores = source.snr() if _by_snr(rule) else source.scores(rule.criterion.name)
    return {name: value.detach().cpu() >= rule.threshold for name, value in scores.items()}


@drawing
def snr_histograms(
    source: Any, threshold: float | None = None, criterion: str | None = None
) -> Figure:
    """A histogram of the signal-to-noise ratios of each gate, with logarithmic axes.

    The units that the criterion keeps are coloured. A threshold on another score than the ratio is
    not drawn. Ratios of 0 and infinity, which a logarithmic axis cannot show, are drawn in the
    first and the last bar. NaN is not drawn.

    Args:
        source: a run, its directory, its posterior, or a guide.
        threshold: the smallest score with which a unit is kept; by default that of the run's
            recipe, or of the criterion.
        criterion: the criterion; by default that of the run's recipe, or the ratio. Other criteria
            are only for runs and their posteriors.

    Raises:
        RequestError: there is no ratio that can be drawn.
    """
    source, rule = _posterior(source, threshold, criterion)
    over = {name: value.flatten() for name, value in _kept(source, rule).items()}
    marked = rule.threshold if _by_snr(rule) else 0.0
    snr = {name: value.detach().flatten().cpu().double() for name, value in source.snr().items()}
    snr = {name: value for name, value in snr.items() if not value.isnan().all()}
    if not snr:
        raise RequestError("there is no signal-to-noise ratio to draw")
    edges = _edges(snr.values(), marked)
    names = sorted(snr, key=lambda name: -len(snr[name]))[:MOST_GATES]
    names = [name for name in snr if name in names]
    columns = 1 if len(names) <= 8 else 2
    rows = math.ceil(len(names) / columns)
    figure, axes = new_figure(0.7 + 1.15 * rows, rows, columns, sharex=True)
    colors = color_cycle()
    for ax, name in zip(axes.flat, names, strict=False):
        values = snr[name]
        kept, removed = values[over[name]], values[~over[name] & ~values.isnan()]
        parts = [part.clamp(edges[0], edges[-1]).numpy() for part in (removed, kept)]
        ax.hist(parts, bins=edges, color=[REMOVED, colors[0]], stacked=True)
        if marked > 0:
            ax.axvline(marked, color=colors[1], linestyle="--")
        ax.set(xscale="log", yscale="log")
        ax.set_ylim(0.5, None)
        words = f"{name}: {len(kept)} of {len(values)}"
        score = "" if _by_snr(rule) else f"{rule.criterion.short} "
        words += f" {score}at or over {rule.threshold:.3g}" if columns == 1 else ""
        ax.set_title(words, fontsize=9 if columns == 1 else 8)
        plain_ticks(ax.xaxis)
        plain_ticks(ax.yaxis)
    for ax in list(axes.flat)[len(names) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        minor_ticks(ax.xaxis)
    left_out = most_shown(len(names), len(snr), "gates")
    if left_out:
        figure.suptitle(left_out, fontsize=9)
    figure.supxlabel(f"signal-to-noise ratio{_outside_words(snr.values())}", fontsize=10)
    figure.supylabel(getattr(source, "elements", "units"), fontsize=10)
    return figure


def _positive_range(values: Iterable[Tensor], *marks: float) -> tuple[float, float]:
    """The range of the values and marks that a logarithmic axis can show; never empty.

    Raises:
        RequestError: there is no such value or mark.
    """
    ends = [mark for mark in marks if mark > 0]
    for value in values:
        placed = value[(value > 0) & value.isfinite()]
        ends += [float(placed.min()), float(placed.max())] if len(placed) else []
    if not ends:
        raise RequestError("no signal-to-noise ratio is positive and finite")
    low, high = min(ends), max(ends)
    return (low, high) if low < high else (0.9 * low, 1.1 * high)


def _outside_words(values: Iterable[Tensor]) -> str:
    """A text that says in which bars the ratios are that a logarithmic axis cannot show."""
    words = []
    for value in values:
        words += ["0 in the first bar"] if bool((value <= 0).any()) else []
        words += ["infinity in the last bar"] if bool((value == math.inf).any()) else []
        words += ["NaN is not drawn"] if bool(value.isnan().any()) else []
    return f" ({', '.join(dict.fromkeys(words))})" if words else ""


def _edges(values: Iterable[Tensor], threshold: float, bins: int = 40) -> list[float]:
    """Edges of bins of equal width on a logarithmic axis; the threshold is one of the edges.

    Raises:
        RequestError: the axis can show neither a value nor the threshold.
    """
    low, high = _positive_range(values, 0.9 * threshold, 1.1 * threshold)
    if threshold <= 0:
        return [low * (high / low) ** (i / bins) for i in range(bins)] + [high * 1.001]
    width = math.log(high / low) / bins
    below = math.ceil(math.log(threshold / low) / width)
    above = math.floor(math.log(high / threshold) / width) + 1
    return [threshold * math.exp(i * width) for i in range(-below, above + 1)]


def image_shape(run: Run) -> tuple[int, int, int] | None:
    """Channels, height and width of the images of a run; None if they are not known."""
    shape = None if run.network is None else run.network["input_shape"]
    if shape is not None and len(shape) == 3:
        channels, height, width = shape
        return channels, height, width
    known = ARCHITECTURES.get(run.request.arch)
    if known is None or known.image_size is None:
        return None
    return (3 if known.dataset == "cifar10" else 1), known.image_size, known.image_size


def pixel_scores(
    run: Run, posterior: Posterior, criterion: str = "snr"
) -> tuple[str, Tensor] | None:
    """The site of the pixels of the image, and the scores of the pixels ``[channels, height,
    width]``. For noise on weights, the score of a pixel is the largest score of the weights that
    read it. None if the run has no noise on the pixels, or the shape of its images is not known.
    """
    shape = image_shape(run)
    if shape is None:
        return None
    for name, value in posterior.scores(criterion).items():
        if posterior.elements == "weights" and value.ndim == 2:
            value = value.amax(0)
        elif not name.endswith("_input"):
            continue
        if value.numel() == math.prod(shape):
            return name, value.detach().double().cpu().reshape(shape)
    return None


@drawing
def kept_pixels(source: Run | str | Path, criterion: str | None = None) -> Figure:
    """The signal-to-noise ratio of the pixels of the image, and which pixels are kept.

    For an image with several channels, the largest ratio of each pixel is shown.

    Args:
        source: a run or its directory.
        criterion: the criterion; by default that of the run's recipe.

    Raises:
        RequestError: the run has no noise on the pixels, or no ratio can be drawn.
    """
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    run = run_of(source)
    posterior, rule = _posterior(run, None, criterion)
    found = pixel_scores(run, posterior)
    decides = pixel_scores(run, posterior, rule.criterion.name)
    if found is None or decides is None:
        raise RequestError(f"{run.directory} has no noise on the pixels of its images")
    (name, snr), over = found, decides[1] >= rule.threshold
    best = snr.amax(0)
    low, high = _positive_range([best])
    figure, axes = new_figure(3.0, 1, 2)
    left, right = axes[0]
    # A logarithmic scale cannot show 0, infinity and NaN.
    placed = best.nan_to_num(nan=low, posinf=high).clamp(low, high)
    shown = left.imshow(placed.numpy(), cmap="cividis", norm=LogNorm(low, high))
    left.set_title(f"SNR of {name}", fontsize=9)
    bar = figure.colorbar(shown, cax=left.inset_axes((0, -0.12, 1, 0.05)), orientation="horizontal")
    ticks = [tick for tick in (0.02, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()
    colors = (REMOVED, color_cycle()[0])
    right.imshow(over.any(0).numpy(), cmap=ListedColormap(colors), vmin=0, vmax=1)
    kept = int(over.sum())
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


def _rows_left(run: Run, gate: str, size: int, rows: int) -> dict[int, int]:
    """Map the units of a gate to the rows of its writer, from which RBP has removed units."""
    if rows == size:
        return {unit: unit for unit in range(size)}
    left = sorted(run.units[gate]["kept"] + run.units[gate]["zeroed"]) if run.units else []
    if len(left) != rows:
        raise RequestError(
            f"the filters of {gate} that are kept are known only after the run has finished"
        )
    return {unit: row for row, unit in enumerate(left)}


@drawing
def first_filters(source: Run | str | Path, criterion: str | None = None) -> Figure:
    """The filters of the first convolution that are kept, with their signal-to-noise ratios; the
    arguments are those of `kept_pixels`."""
    import torch

    run = run_of(source)
    posterior, rule = _posterior(run, None, criterion)
    shape = image_shape(run)
    # With noise on weights, the ratio of a filter is the largest ratio of its weights.
    snr = {n: v.flatten(1).amax(1) if v.ndim > 1 else v for n, v in posterior.snr().items()}
    kept = {n: v.flatten(1).any(1) if v.ndim > 1 else v for n, v in _kept(posterior, rule).items()}
    found = [
        (name.removesuffix(".weight"), value)
        for name, value in posterior.weights.items()
        if value.ndim == 4 and name.endswith(".weight")
    ]
    if not found or found[0][0] not in snr or not shape or found[0][1].shape[1] != shape[0]:
        raise RequestError(f"{run.directory} has no noise on a first convolution")
    name, weight = found[0]
    if shape[0] not in (1, 3) or weight.shape[-1] == 1:
        raise RequestError(
            f"the filters of {name} cannot be shown: they do not have one or three channels"
        )
    row = _rows_left(run, name, len(snr[name]), len(weight))
    left = torch.tensor(list(row), device="cpu")
    over = left[kept[name][left]]
    order = over[snr[name][over].argsort(descending=True)][:MOST_FILTERS].tolist()
    if not order:
        raise RequestError(f"no filter of {name} reaches the threshold {rule.threshold:g}")
    columns = min(8, len(order))
    rows = math.ceil(len(order) / columns)
    figure, axes = new_figure(0.6 + 0.85 * rows, rows, columns)
    scale = float(weight[[row[unit] for unit in order]].abs().max()) or 1.0
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
