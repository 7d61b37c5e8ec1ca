"""A self-contained HTML page about one or several runs."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sbp.errors import RequestError
from pyro_sbp.machine import NOISY
from pyro_sbp.reports import pages, plots
from pyro_sbp.reports.findings import Findings, find
from pyro_sbp.reports.plots.style import lay_out
from pyro_sbp.reports.posterior import gate_table, nearest_table
from pyro_sbp.reports.published import PUBLISHED
from pyro_sbp.training.files import write_text, write_whole
from pyro_sbp.training.runs import Run
from pyro_sbp.training.summary import Summary, with_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

#: Dots per inch of the PNG files.
DPI = 150
HELD_OUT_WORDS = (
    "The network at other thresholds on the {title}, without fine-tuning. Errors are "
    "measured on the {count:,} training images that are reserved for validation, so a threshold "
    "can be chosen with them. The error of the choice is then measured on the test images."
)
ZERO_WORDS = (
    "Zeros alone do not make the network faster, because a dense layer multiplies by them too. "
    "Units that no weight reads are removed, which reduces the MACs."
)
SWEEP_WORDS = (
    "The network at other thresholds on the {title}, without fine-tuning. Errors are "
    "measured on the test images, as pyro-sbp prune --threshold does, because no training images "
    "were reserved for validation. Do not use them to choose a threshold: the error of the choice "
    "would have to be measured on other images."
)


def write_report(
    runs: Sequence[Run],
    data_dir: Path | None = None,
    sweep: bool = True,
    watch: Callable[[str], None] = lambda words: None,
    criterion: str | None = None,
) -> Path:
    """Write `report.html` into the directory of the first run, and its figures into `report/`.

    Nothing is downloaded.

    Args:
        runs: one or several runs, finished or not.
        data_dir: the directory of the data sets; by default the one with which each run was
            trained.
        sweep: whether to measure finished runs at other thresholds, which takes most of the time.
        watch: called with a line about the current step.
        criterion: the criterion that decides which units are kept; by default that of the recipe of
            each run.

    Returns:
        The path of the page.

    Raises:
        RequestError: Matplotlib is missing, or the directory cannot be written.
    """
    plots.check_matplotlib()
    target = runs[0].directory
    pictures = _Pictures(target / "report")
    body = []
    names = [run.name for run in runs]
    for index, run in enumerate(runs):
        watch(f"{run.directory}: reading it")
        found = find(run, data_dir, sweep, criterion)
        watch(f"{run.directory}: drawing")
        # The directories of two runs may have the same name.
        number = f"{index}-" if names.count(run.name) > 1 else ""
        pictures.prefix = f"{number}{run.name}-" if len(runs) > 1 else ""
        body += _of_run(found, pictures, 2 if len(runs) > 1 else 1)
    pictures.prefix = ""
    several = []
    if len(runs) > 1:
        several = [pages.heading(1, f"{len(runs)} runs of pyro-sbp"), _overview(runs)]
    title = f"{len(runs)} runs" if len(runs) > 1 else runs[0].name
    compared = _frontier(runs, pictures)
    parts = [*several, *compared, *body] if several else [*body, *compared]
    try:
        write_text(target / "report.html", pages.page(f"pyro-sbp: {title}", parts))
    except OSError as error:
        raise RequestError(str(error)) from error
    return target / "report.html"


class _Pictures:
    """Draws figures for the page, and writes them as PNG files into a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.prefix = directory, ""
        try:
            directory.mkdir(exist_ok=True)
            for old in directory.glob("*.png"):
                old.unlink()
        except OSError as error:
            raise RequestError(f"cannot write {directory}: {error.strerror}") from error

    def __call__(self, name: str, draw: Callable[..., Figure], words: str, *args: Any) -> str:
        """A figure from a function of `plots`, or a line that says why there is none."""
        try:
            light, dark = draw(*args), draw(*args, dark=True)
        except RequestError as error:
            return pages.paragraph(f"No picture: {error}.", "soft")
        lay_out(light, dark)
        png = io.BytesIO()
        light.savefig(png, dpi=DPI, format="png")
        write_whole(self.directory / f"{self.prefix}{name}.png", png.getvalue())
        return pages.picture(plots.svg(light), plots.svg(dark), words)


def _of_run(found: Findings, pictures: _Pictures, level: int) -> list[str]:
    run = found.run
    request = run.request
    words = f"{request.arch} on {request.dataset} by {request.method}, seed {request.seed}"
    parts = [pages.heading(level, f"{run.name}: {words}")]
    if run.summary is None:
        parts.append(pages.paragraph(_standing(found), "note"))
    else:
        parts += [_headline(run), _result(run.summary)]
    sections: tuple[tuple[str, Callable[[Findings, _Pictures], list[str]]], ...] = (
        ("Units", _units),
        ("Training", _training),
        ("Other thresholds", _thresholds),
        ("Layers", _layers),
        ("Latency", _latency),
        ("Settings and machine", _asked),
    )
    for title, section in sections:
        content = section(found, pictures)
        if content:
            parts += [pages.heading(level + 1, title), *content]
    return parts


def _standing(found: Findings) -> str:
    run = found.run
    go_on = f"Resume it with pyro-sbp train --resume {run.directory}."
    if not run.metrics:
        return f"This run has not finished its first epoch. {go_on}"
    last = run.metrics[-1]
    return (
        "This run has not finished, so it has no pruned network yet. The results below are those "
        f"of its last checkpoint. It has reached epoch {last['epoch']} of the phase "
        f"{last['phase']!r}, with a test error of {_percent(last['error'])}. {go_on}"
    )


def _headline(run: Run) -> str:
    assert run.summary is not None
    summary = run.summary
    dense = summary.error.dense
    before = "" if dense is None else f"; that of the dense network is {_percent(dense)}"
    return pages.paragraph(
        f"{summary.macs.ratio:.2f} times fewer multiply-accumulates and "
        f"{summary.parameters.ratio:.2f} times fewer parameters. The test error is "
        f"{_percent(run.error)}{before}."
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _result(summary: Summary) -> str:
    check = summary.equivalence
    words = "; NLL in nats per example" if summary.calibration else ""
    errors = pages.table(*summary.error_table(), f"Errors after the last epoch{words}")
    sizes = pages.table(
        ("", "dense", "pruned", "ratio"), summary.size_rows(), "Sizes; MACs for one image"
    )
    checked = pages.paragraph(
        "The pruned network differs from the network with the other units masked by "
        f"{check.max_rel_diff_float64:.1e} in float64, relative to the size of the outputs, "
        f"and by {check.max_abs_diff:.1e} in the network's own precision.",
        "soft",
    )
    return pages.side([errors, sizes]) + _weights(summary) + checked


def _weights(summary: Summary) -> str:
    """The weights that are kept, for a method that removes weights."""
    weights, files = summary.weights, summary.files
    if weights is None:
        return ""
    words = weights.in_words
    text = f"{words[0].upper()}{words[1:]}, as the paper counts them. {ZERO_WORDS}"
    if files is not None:
        text += (
            f" The file of the dense network has {files.dense:,} bytes, that of the smaller one "
            f"{files.pruned:,}"
        )
        text += "." if files.sparse is None else f", and {files.sparse:,} without its zeros."
    table = pages.table(("layer", "weights kept", "of"), weights.rows(), "Weights by layer")
    return table + pages.paragraph(text)


def _compression(ratio: float | None) -> str:
    return "none left" if ratio is None else f"{ratio:.1f}x"


def _log_alpha(threshold: float) -> str:
    """A threshold on the signal-to-noise ratio of weights, as a bound on log alpha."""
    if threshold == 0:
        return "so every weight is kept, whatever its log alpha"
    return f"which is a log alpha of {-2 * math.log(threshold):.3g} or less"


def _units(found: Findings, pictures: _Pictures) -> list[str]:
    if found.description is None or found.posterior is None:
        return [pages.paragraph(f"No posterior: {found.missing['posterior']}.", "soft")]
    description, criterion = found.description, found.rule.criterion
    gates, threshold = description["gates"], description["threshold"]
    elements = description["elements"]
    head, rows = gate_table(description)
    meanings = {
        "units": f"Units with a {criterion.title} ({criterion.short}) of {threshold:.3g} or more "
        "are kept. The table shows its quantiles, the mean of E[theta] over the units, and the "
        "KL of the gate in nats:",
        "weights": f"Weights with a signal-to-noise ratio (SNR) of {threshold:.3g} or more are "
        f"kept, {_log_alpha(threshold)}. The table shows quantiles of the SNR, the mean of the "
        "absolute values of the weights, and the KL of the layer in nats:",
    }
    parts = [
        pages.paragraph(meanings[elements]),
        pages.table(head, rows, f"{elements.capitalize()} by {head[0]}"),
    ]
    held = ", ".join(g["gate"] for g in gates if g["held"])
    if held:
        kept = ", and the best is kept" if elements == "units" else ""
        words = f"No {elements[:-1]} reaches the threshold{kept}: {held}."
        parts.append(pages.paragraph(words, "note"))
    parts.append(pages.side(_scores(found, pictures, head[0])))
    parts.append(
        pages.details(
            f"{elements.capitalize()} closest to the threshold {threshold:.3g}",
            [
                pages.table(*nearest_table(description), f"Closest {elements}"),
            ],
        )
    )
    if description["waiting"]:
        words = f"Gates without a turn yet: {', '.join(description['waiting'])}."
        parts.append(pages.paragraph(words, "soft"))
    left = description["left_alone"]
    if left:
        rows = [
            (name, with_share(why, description["shares"].get(name))) for name, why in left.items()
        ]
        parts.append(
            pages.details(
                f"Not prunable: {len(left)} of the layers",
                [pages.table(("layer", "why"), rows, "Layers without a gate")],
            )
        )
    return parts


def _scores(found: Findings, pictures: _Pictures, site: str) -> list[str]:
    """The figures of the scores of units or weights; `site` is "gate" or "layer"."""
    assert found.description is not None and found.posterior is not None
    run, criterion, threshold = found.run, found.rule.criterion, found.description["threshold"]
    gates = found.description["gates"]
    counts = "; ".join(f"{g['gate']} keeps {g['kept']} of {g['total']}" for g in gates)
    drawn = [
        pictures(
            "snr",
            plots.snr_histograms,
            f"Histograms of the signal-to-noise ratio of every {site}; the threshold on the "
            f"{criterion.title} is {threshold:.3g}. {counts}.",
            found.posterior,
            threshold,
            criterion.name,
        )
    ]
    # Not every network has such gates. The page does not mention missing ones.
    if plots.pixel_scores(run, found.posterior) is not None:
        drawn.append(
            pictures(
                "pixels",
                plots.kept_pixels,
                "The signal-to-noise ratios of the pixels of the image, and which pixels are kept.",
                run,
                criterion.name,
            )
        )
    if any(value.ndim == 4 for value in found.posterior.weights.values()):
        drawn.append(
            pictures(
                "filters",
                plots.first_filters,
                "The kept filters of the first convolution, best first.",
                run,
                criterion.name,
            )
        )
    return drawn


def _training(found: Findings, pictures: _Pictures) -> list[str]:
    lines = found.run.metrics
    if not lines:
        return [pages.paragraph("No epoch has ended yet.", "soft")]
    last = {line["phase"]: line for line in lines}
    words = "; ".join(
        f"{name}: {line['epoch']} epochs, at the end loss {line['loss']:.4g}, test error "
        f"{_percent(line['error'])}, {sum(line['units'].values())} units"
        for name, line in last.items()
    )
    rows = [
        (
            name,
            line["epoch"],
            f"{line['loss']:.4g}",
            f"{line['nll']:.4g}",
            f"{line['kl']:.4g}",
            _percent(line["error"]),
            sum(line["units"].values()),
            f"{sum(one['seconds'] for one in lines if one['phase'] == name):.0f} s",
        )
        for name, line in last.items()
    ]
    head = ("phase", "epochs", "loss", "NLL", "KL", "test error", "units", "time")
    parts = [
        pages.table(head, rows, "The end of every phase; nats per example, KL without weights"),
        pictures(
            "training",
            plots.training_curves,
            f"Loss, NLL, KL, test error and remaining units by epoch. {words}.",
            found.run,
        ),
    ]
    return [pages.side(parts)]


def _thresholds(found: Findings, pictures: _Pictures) -> list[str]:
    if found.run.summary is None:
        return []
    if found.sweep is None:
        return [pages.paragraph(f"Not measured: {found.missing['sweep']}.", "soft")]
    recipe, (criterion, threshold) = found.run.request.recipe, found.rule
    kind, own = found.sweep[0]["split"], recipe.rule() == found.rule
    gates = list(found.sweep[0]["units"])
    # For a network with many gates, the table has only the sums.
    shown = gates if len(gates) <= 6 else []
    rows = [
        (
            f"{row['threshold']:.3g}"
            + (" (recipe)" if own and row["threshold"] == threshold else ""),
            _percent(row["error"]),
            f"{row['nll']:.4f}",
            _percent(row["ece"]),
            f"{row['macs']:,}",
            f"{row['ratio']:.2f}x",
            *([_compression(row["compression"])] if "compression" in row else []),
            *([row["units"][gate] for gate in shown] or [sum(row["units"].values())]),
            ", ".join(row["held"]) or "-",
        )
        for row in found.sweep
    ]
    head = (
        "threshold",
        f"{kind} error",
        "NLL",
        "ECE",
        "MACs",
        "ratio",
        *(["weights"] if "compression" in found.sweep[0] else []),
        *(shown or ["units"]),
        "only the best unit kept",
    )
    words = "; ".join(
        f"{row['threshold']:.3g}: {_percent(row['error'])} at {row['ratio']:.1f} times"
        for row in found.sweep
    )
    drawn = [
        pictures(
            "error-threshold",
            plots.error_against_threshold,
            f"{kind.capitalize()} error against the threshold. {words}.",
            found.sweep,
            threshold,
        ),
        pictures(
            "error-macs",
            plots.error_against_macs,
            f"{kind.capitalize()} error against the MACs ratio, by threshold. {words}.",
            found.sweep,
            threshold,
        ),
    ]
    return [
        pages.paragraph(
            (HELD_OUT_WORDS if recipe.holdout else SWEEP_WORDS).format(
                count=recipe.holdout, title=criterion.title
            )
        ),
        pages.table(head, rows, "Thresholds, errors and units kept"),
        pages.side(drawn),
    ]


def _layers(found: Findings, pictures: _Pictures) -> list[str]:
    if found.run.summary is None:
        return []
    if found.costs is None:
        return [pages.paragraph(f"Not counted: {found.missing['costs']}.", "soft")]
    rows = [
        (
            name or "elsewhere",
            *(f"{cost[part][0]:,}" for part in ("dense", "pruned")),
            *(f"{cost[part][1]:,}" for part in ("dense", "pruned")),
        )
        for name, cost in found.costs.items()
    ]
    head = ("layer", "MACs, dense", "pruned", "parameters, dense", "pruned")
    whole = pages.table(head, rows, "MACs of one image, and parameters, by layer")
    words = "; ".join(
        f"{name or 'elsewhere'}: {cost['dense'][0]:,} to {cost['pruned'][0]:,} MACs"
        for name, cost in list(found.costs.items())[:12]
    )
    parts = [
        whole if len(rows) <= 20 else pages.details(f"All {len(rows)} layers", [whole]),
        pictures(
            "layers",
            plots.layer_costs,
            f"MACs and parameters of every layer, dense and pruned. {words}.",
            found.run,
            found.costs,
        ),
    ]
    return [pages.side(parts)]


def _latency(found: Findings, pictures: _Pictures) -> list[str]:
    run = found.run
    if run.summary is None:
        return []
    if not run.bench:
        return [
            pages.paragraph(f"Not measured: pyro-sbp bench {run.directory} measures it.", "soft")
        ]
    # The column is omitted if all rows have the same runtime.
    several = any(row["runtime"] != "eager" for row in run.bench)
    # Earlier versions measured no confidence interval.
    intervals = any(row.get("speedup_low") is not None for row in run.bench)
    rows = [
        (
            row["device"],
            *([row["runtime"]] if several else []),
            row["threads"],
            row["batch_size"],
            f"{row['dense_ms']:.3f}",
            f"{row['pruned_ms']:.3f}",
            f"{row['speedup']:.2f}x",
            *([_interval(row)] if intervals else []),
            f"{row['spread']:.0%}",
        )
        for row in run.bench
    ]
    runtime = ["runtime"] if several else []
    head = ["device", *runtime, "threads", "batch", "dense, ms", "pruned, ms", "speed-up"]
    head += [*(["95 % interval"] if intervals else []), "spread"]
    noisy = []
    if any(row["spread"] > NOISY for row in run.bench):
        words = f"A spread is over {NOISY:.0%}: the machine was busy. Measure again."
        noisy = [pages.paragraph(words, "note")]
    words = "; ".join(
        f"{row['device']}, {row['runtime'] + ', ' if several else ''}batch {row['batch_size']}, "
        f"{row['threads']} threads: {row['speedup']:.2f}x"
        for row in run.bench
    )
    parts = [
        pages.table(
            head, rows, "Milliseconds per call, median; spread: half the interquartile range"
        ),
        pictures(
            "latency", plots.latency, f"Milliseconds per call of both networks. {words}.", run
        ),
    ]
    return [*noisy, pages.side(parts)]


def _interval(row: Mapping[str, Any]) -> str:
    """The confidence interval of a speed-up."""
    low, high = row.get("speedup_low"), row.get("speedup_high")
    return "-" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _asked(found: Findings, pictures: _Pictures) -> list[str]:
    rows = []
    for key, value in found.run.asked.items():
        inner = value if isinstance(value, dict) else None
        rows += (
            [(f"{key}: {k}", _text(v)) for k, v in inner.items()]
            if inner
            else [(key, _text(value))]
        )
    return [pages.details("Recipe, seed, versions and machine", [pages.table(("", "value"), rows)])]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _overview(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        done = run.summary
        rows.append(
            (
                run.name,
                run.request.arch,
                run.request.dataset,
                run.request.recipe.name,
                run.request.seed,
                "not finished" if done is None else _percent(run.error),
                "-" if done is None else f"{done.macs.ratio:.2f}x",
                "-" if done is None else f"{done.parameters.ratio:.2f}x",
            )
        )
    head = ("run", "arch", "data set", "recipe", "seed", "test error", "MACs", "parameters")
    return pages.table(head, rows, "The runs, and the ratios of their MACs and parameters")


def _frontier(runs: Sequence[Run], pictures: _Pictures) -> list[str]:
    finished = [run for run in runs if run.summary is not None]
    if not finished:
        return []
    pairs = {(run.request.arch, run.request.dataset) for run in finished}
    papers = [paper for paper in PUBLISHED if (paper.arch, paper.dataset) in pairs]
    if not papers and len(finished) == 1:
        return []
    mine = "; ".join(
        f"{run.name}: {_percent(run.error)} at {run.macs_ratio:.1f} times" for run in finished
    )
    theirs = "; ".join(f"{p.method}: {p.error} % at {p.macs_ratio:.1f} times" for p in papers)
    parts = [
        pages.heading(2, "Error against MACs"),
        pages.paragraph(
            "The runs after their last epoch, and published results. Most papers report the best "
            "test error of all epochs, so small differences mean little. MACs are counted from the "
            "published units."
        ),
        pictures(
            "frontier",
            plots.frontier,
            f"Test error against the MACs ratio. Runs: {mine}. Published: {theirs or 'none'}.",
            runs,
        ),
    ]
    if papers:
        rows = [
            (p.method, p.arch, f"{p.error:.2f} %", f"{p.macs_ratio:.2f}x", p.units or "-", p.source)
            for p in papers
        ]
        head = ("method", "arch", "test error", "MACs", "units left", "source")
        parts.append(pages.details("Published results", [pages.table(head, rows, "Published")]))
    return parts
