"""The figure of the prior and the posterior of SBP in docs/method.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_sbp.experiments import figure_files
from pyro_sbp.experiments.figure_files import describe, write_figure
from pyro_sbp.reports.plots.style import REMOVED, color_cycle, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FILES", "PAGE", "POSTERIORS", "draw", "draw_prior", "out_of_date"]

#: The files of the figure, and whether each is for a dark page.
FILES = {"docs/prior.svg": False, "docs/prior-dark.svg": True}
#: The page that shows the figure.
PAGE = "docs/method.md"
#: The location and the scale of the posteriors that the figure shows, by title.
POSTERIORS = {"posterior of a removed unit": (-4.0, 2.5), "posterior of a kept unit": (-0.6, 0.25)}
PRIOR = "prior"


def moments() -> dict[str, tuple[float, float, float]]:
    """The mean, the standard deviation and the SNR of the noise, by title, the prior first."""
    import torch

    from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform

    found = {}
    parameters = torch.tensor(list(POSTERIORS.values()), dtype=torch.float64, device="cpu")
    posteriors = TruncatedLogNormal(parameters[:, 0], parameters[:, 1])
    prior = TruncatedLogUniform()
    found[PRIOR] = (float(prior.mean), float(prior.stddev), float(prior.snr))
    columns = (posteriors.mean, posteriors.stddev, posteriors.snr)
    for title, mean, stddev, snr in zip(POSTERIORS, *columns, strict=True):
        found[title] = (float(mean), float(stddev), float(snr))
    return found


def _description(drawn: Mapping[str, Sequence[float]]) -> str:
    numbers = {title: [f"{value:.4g}" for value in values] for title, values in drawn.items()}
    return describe("prior and posteriors of SBP", [POSTERIORS, numbers])


def out_of_date(root: Path) -> list[str]:
    """The files of the figure that are missing or were drawn from other numbers; none for a
    checkout without the page that shows them."""
    if not (root / PAGE).is_file():
        return []
    return figure_files.out_of_date(root, FILES, _description(moments()))


def draw(root: Path, names: Sequence[str]) -> None:
    """Draw the named files of a checkout.

    Raises:
        RequestError: Matplotlib is not installed, or a file cannot be written.
    """
    drawn = moments() if names else {}
    for name in names:
        figure = draw_prior(drawn, dark=FILES[name])
        write_figure(root / name, figure, _description(drawn))


@drawing
def draw_prior(moments: Mapping[str, Sequence[float]]) -> Figure:
    """The density of log theta, and the mean and the standard deviation of theta, one row each.

    Args:
        moments: the mean, the standard deviation and the SNR of theta, by title: that of the prior,
            and those of `POSTERIORS`.
    """
    import torch

    from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform

    figure, axes = new_figure(1.45 * len(moments), len(moments), 2, sharex="col")
    log_theta = torch.linspace(-20, 0, 801, dtype=torch.float64, device="cpu")
    theta = log_theta.exp()
    used = color_cycle()
    colors = dict(zip(moments, (used[1], REMOVED, used[0]), strict=True))
    for (left, right), (title, (mean, stddev, snr)) in zip(axes, moments.items(), strict=True):
        if title in POSTERIORS:
            loc, scale = torch.tensor(POSTERIORS[title], dtype=torch.float64, device="cpu")
            distribution: TruncatedLogNormal | TruncatedLogUniform = TruncatedLogNormal(loc, scale)
        else:
            distribution = TruncatedLogUniform()
        # The density of log theta is that of theta times theta.
        inside = theta.clamp(math.exp(-20) * (1 + 1e-9), 1 - 1e-9)
        density = (distribution.log_prob(inside) + log_theta).exp()
        color = colors[title]
        left.plot(log_theta, density, color=color)
        left.fill_between(log_theta, density, color=color, alpha=0.25)
        left.set(title=title, xlim=(-20.4, 0.4), yticks=[])
        left.set_ylim(0, 1.25 * float(density.max()))
        right.errorbar(
            mean, 0, xerr=stddev, fmt="o", color=color, markersize=8, capsize=5, elinewidth=2
        )
        right.axvline(0, color=REMOVED, linewidth=0.8, linestyle="--")
        right.set(title=f"SNR {snr:.2f}", xlim=(-0.25, 1.02), ylim=(-1, 1), yticks=[])
        right.spines["left"].set_visible(False)
    axes[-1, 0].set_xlabel("density of log θ")
    axes[-1, 1].set_xlabel("θ: mean and standard deviation")
    return figure
