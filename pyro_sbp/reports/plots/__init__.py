"""Plots of a run, as Matplotlib figures.

Every function accepts `dark=True` for a dark background, and raises `RequestError` if Matplotlib
is not installed or the run has nothing to draw. A notebook shows the figures after it has imported
`matplotlib.pyplot`.
"""

from pyro_sbp.reports.plots.costs import (
    error_against_macs,
    error_against_threshold,
    latency,
    layer_costs,
)
from pyro_sbp.reports.plots.frontier import Point, draw_frontier, frontier, published_points
from pyro_sbp.reports.plots.posteriors import (
    first_filters,
    image_shape,
    kept_pixels,
    pixel_scores,
    snr_histograms,
)
from pyro_sbp.reports.plots.style import check_matplotlib, svg
from pyro_sbp.reports.plots.training import training_curves

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
    "pixel_scores",
    "published_points",
    "snr_histograms",
    "svg",
    "training_curves",
]
