"""The result of a run on its page: errors, sizes and kept weights."""

from __future__ import annotations

from pyro_sbp.reports import pages
from pyro_sbp.reports.findings import Findings
from pyro_sbp.training.runs import Run
from pyro_sbp.training.summary import Summary

__all__ = ["result"]

ZERO_WORDS = (
    "Zeros alone do not make the network faster, because a dense layer multiplies by them too. "
    "Units that no weight reads are removed, which reduces the MACs."
)


def result(found: Findings) -> list[str]:
    """The result of a finished run, or the progress of an unfinished one."""
    run = found.run
    if run.summary is None:
        return [pages.paragraph(_progress(run), "note")]
    return [
        pages.paragraph(_headline(run.summary)),
        _tables(run.summary),
        *_weights(run.summary),
        _difference(run.summary),
    ]


def _progress(run: Run) -> str:
    go_on = f"Resume it with pyro-sbp train --resume {run.directory}."
    if not run.metrics:
        return f"This run has not finished its first epoch. {go_on}"
    last = run.metrics[-1]
    return (
        "This run has not finished, so it has no pruned network yet. The results below are those "
        f"of its last checkpoint. It has reached epoch {last['epoch']} of the phase "
        f"{last['phase']!r}, with a test error of {pages.percent(last['error'])}. {go_on}"
    )


def _headline(summary: Summary) -> str:
    dense = summary.error.dense
    before = "" if dense is None else f"; that of the dense network is {pages.percent(dense)}"
    return (
        f"{summary.macs.ratio:.2f} times fewer multiply-accumulates and "
        f"{summary.parameters.ratio:.2f} times fewer parameters. The test error is "
        f"{pages.percent(summary.error.last)}{before}."
    )


def _tables(summary: Summary) -> str:
    words = "; NLL in nats per example" if summary.calibration else ""
    errors = pages.table(*summary.error_table(), f"Errors after the last epoch{words}")
    sizes = pages.table(
        ("", "dense", "pruned", "ratio"), summary.size_rows(), "Sizes; MACs for one image"
    )
    return pages.side([errors, sizes])


def _weights(summary: Summary) -> list[str]:
    """The weights that are kept, for a method that removes weights."""
    weights, files = summary.weights, summary.files
    if weights is None:
        return []
    words = weights.in_words
    text = f"{words[0].upper()}{words[1:]}, as the paper counts them. {ZERO_WORDS}"
    if files is not None:
        text += (
            f" The file of the dense network has {files.dense:,} bytes, that of the smaller one "
            f"{files.pruned:,}"
        )
        text += "." if files.sparse is None else f", and {files.sparse:,} without its zeros."
    table = pages.table(("layer", "weights kept", "of"), weights.rows(), "Weights by layer")
    return [table, pages.paragraph(text)]


def _difference(summary: Summary) -> str:
    """The difference between the pruned and the masked network."""
    check = summary.equivalence
    return pages.paragraph(
        "The pruned network differs from the network with the other units masked by "
        f"{check.max_rel_diff_float64:.1e} in float64, relative to the size of the outputs, "
        f"and by {check.max_abs_diff:.1e} in the network's own precision.",
        "soft",
    )
