"""The text that `pyro-sbp bench` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pyro_sbp.cli.quantized import comparison
from pyro_sbp.machine import NOISY

if TYPE_CHECKING:
    from pyro_sbp.cli.bench_run import Measured
    from pyro_sbp.deployment.benchmarking import Comparison, Layout

__all__ = ["bench_text"]

_NETWORKS = ("dense", "pruned")
HOW = (
    "ms per call, median of blocks of calls in turn; speed-up: median ratio in groups of blocks, "
    "with its confidence interval; spread: half the interquartile range; floor: one unit in every "
    "gate"
)


def bench_text(measured: Measured, dense_error: float | None, layout: Layout) -> str:
    """The tables and the result in words.

    Args:
        measured: the two networks, measured.
        dense_error: the test error of the dense network in percent, if the run has measured it.
        layout: the layout of the tables.
    """
    return "\n".join(_parts(measured, dense_error, layout))


def _parts(measured: Measured, dense_error: float | None, layout: Layout) -> Iterator[str]:
    found, sizes = measured.comparison, measured.sizes
    yield found.latency_table(layout)
    if measured.quantized is not None:
        rows = comparison(measured.quantized, dense_error, sizes, found.latencies)
        yield f"\n{layout(*rows)}\n"
    if any(latency.spread > NOISY for latency in found.latencies):
        yield f"a spread is over {NOISY:.0%}: the machine was busy; measure again"
    yield HOW
    yield f"CPU governor: {measured.governor or 'not readable'}"
    yield (
        f"MACs {found.dense_macs:,} -> {found.pruned_macs:,} ({found.macs_ratio:.2f}x), "
        f"parameters {found.dense_parameters:,} -> {found.pruned_parameters:,}"
    )
    file, peak = (
        " -> ".join(f"{sizes[f'{network}_{of}_bytes'] / 1e3:,.1f}" for network in _NETWORKS)
        for of in ("file", "peak")
    )
    yield f"file {file} kB, peak memory of a call with one image {peak} kB"
    counts = measured.ptflops().values()
    texts = ["none" if count is None else f"{count:,}" for count in counts]
    yield f"ptflops: MACs {' -> '.join(texts)}"
    checks = zip(_NETWORKS, (found.dense_check, found.pruned_check), strict=True)
    for name, check in checks:
        if check is not None and (explanation := check.explanation(name)):
            yield explanation
    yield f"\nThe pruned network is {_speedups(found)} times as fast as the dense network."


def _speedups(found: Comparison) -> str:
    """The range of all speed-ups, such as "1.2 to 3.4"."""
    speedups = [f"{latency.speedup:.1f}" for latency in found.latencies]
    least, most = (choose(speedups, key=float) for choose in (min, max))
    return most if least == most else f"{least} to {most}"
