"""Plots of runs. The functions are those of `pyro_sbp.reports.plots`."""

from pyro_sbp.reports.plots import *  # noqa: F403
from pyro_sbp.reports.plots import __all__ as __all__
