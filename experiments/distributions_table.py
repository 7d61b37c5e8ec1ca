"""How right and how fast the distributions are: the tables of the README.

    python -m pyro_sbp.experiments.distributions_table [accuracy|comparison|cost] [--points N]

`accuracy` compares with 110 digits, `comparison` does the same for the two constructions that
others use, `cost` times on this machine. All three without an argument; minutes, not seconds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from mpmath import mpf
from torch import Tensor

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform, TruncatedNormal
from pyro_sbp.experiments.truncated_normal_truth import Truth

__all__ = ["accuracy", "points"]

INF = math.inf
BOX = (-20.0, 0.0)
#: Bounds, the range of loc, and the share of the points of each set.
SETS = (
    (BOX, (-25.0, 5.0), 1.0),
    ((-5.0, 0.0), (-10.0, 5.0), 0.1),
    ((-1.0, 1.0), (-6.0, 6.0), 0.1),
    ((0.0, INF), (-20.0, 20.0), 0.1),
    ((-INF, 0.0), (-20.0, 20.0), 0.1),
)
LOG_SCALE = (-10.0, 5.0)
DRAWS = 4


class Points(NamedTuple):
    """Settings of the parameters [n], and probabilities [DRAWS, n], all float64."""

    loc: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    u: Tensor

    def rounded(self, dtype: torch.dtype) -> Points:
        return Points(*(x.to(dtype) for x in self))


def points(n: int, bounds: tuple[float, float], locs: tuple[float, float], seed: int = 0) -> Points:
    """Half a grid, a quarter random, a quarter with loc within a few scales of an end."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    side = math.ceil(math.sqrt(n / 2))
    grid_loc = torch.linspace(*locs, side, dtype=torch.float64)
    grid_log_scale = torch.linspace(*LOG_SCALE, side, dtype=torch.float64)
    grid = torch.cartesian_prod(grid_loc, grid_log_scale)
    rest = max(n - len(grid), 2)
    log_scale = LOG_SCALE[0] + uniform(rest) * (LOG_SCALE[1] - LOG_SCALE[0])
    loc = locs[0] + uniform(rest) * (locs[1] - locs[0])
    ends = torch.tensor([x for x in bounds if math.isfinite(x)], dtype=torch.float64)
    end = ends[torch.arange(rest) % len(ends)]
    near = end + log_scale.exp() * 6 * (uniform(rest) - 0.5)
    loc = torch.where(torch.arange(rest) < rest // 2, loc, near).clamp(*locs)
    loc, log_scale = torch.cat([grid[:, 0], loc]), torch.cat([grid[:, 1], log_scale])
    u = uniform(DRAWS, len(loc))
    u[0] = torch.exp(-20 * u[0])  # one of the draws far in the lower tail, one in the upper
    u[1] = 1 - torch.exp(-12 * u[1])
    low, high = (torch.full_like(loc, x) for x in bounds)
    return Points(loc, log_scale.exp(), low, high, u)


class Quantity(NamedTuple):
    """A measured quantity: what it is called, its bound in each dtype, and its floor."""

    name: str
    bound64: float
    bound32: float
    floor: str  # in words: the error is absolute over the larger of the value and this


QUANTITIES = {
    "log_normalizer": Quantity("log Z", 1e-12, 3e-7, "1"),
    "entropy": Quantity("entropy", 1e-12, 3e-7, "1"),
    "kl": Quantity("KL", 1e-12, 3e-7, "-"),
    "exp_mean": Quantity("E[theta]", 1e-12, 3e-7, "-"),
    "exp_variance": Quantity("Var[theta]", 1e-12, 3e-7, "-"),
    "exp_snr": Quantity("SNR[theta]", 1e-12, 3e-7, "-"),
    "mean": Quantity("E[x]", 1e-12, 3e-7, "sd[x]"),
    "variance": Quantity("Var[x]", 1e-12, 3e-7, "-"),
    "log_prob": Quantity("log_prob", 1e-12, 3e-7, "1"),
    "cdf": Quantity("cdf", 1e-12, 3e-7, "1"),
    "icdf": Quantity("icdf of x", 1e-11, 2e-6, "absolute; one-sided: 1"),
    "exp_icdf": Quantity("icdf of theta", 1e-11, 3e-7, "-"),
    "kl_d_log_scale": Quantity("dKL/dlog scale", 1e-12, 3e-7, "-"),
    "kl_d_loc": Quantity("dKL/dloc", 1e-11, 3e-7, "1e-3/scale"),
    "exp_mean_d_loc": Quantity("dE[theta]/dloc", 1e-12, 3e-7, "-"),
    "exp_mean_d_log_scale": Quantity("dE[theta]/dlog scale", 1e-12, 3e-7, "sd[theta] sd[z^2]"),
    "mean_d_loc": Quantity("dE[x]/dloc", 1e-12, 3e-7, "-"),
    "sample_d_loc": Quantity("dx/dloc", 1e-9, 3e-7, "its mean"),
    "sample_d_log_scale": Quantity("dx/dlog scale", 1e-9, 3e-7, "its mean"),
}


def measured(p: Points) -> dict[str, Tensor]:
    """Every quantity by the classes, in the dtype of the points: [n], or [DRAWS, n]."""
    loc, scale = p.loc.clone().requires_grad_(), p.scale.clone().requires_grad_()
    x = TruncatedNormal(loc, scale, p.low, p.high)
    out = {"mean": x.mean, "variance": x.variance, "entropy": x.entropy(), "icdf": x.icdf(p.u)}
    value = out["icdf"].detach()
    out["log_prob"], out["cdf"], out["value"] = x.log_prob(value), x.cdf(value), value
    # log Z is the normalizer of the density, here where the density of the normal is one.
    out["log_normalizer"] = _log_normalizer(loc, scale, p.low, p.high)
    gradients = {"mean": out["mean"]}
    if p.low.isfinite().all() and p.high.isfinite().all():
        theta = TruncatedLogNormal(loc, scale, p.low, p.high)
        prior = TruncatedLogUniform(p.low, p.high)
        out["kl"] = torch.distributions.kl_divergence(theta, prior)
        out["exp_mean"], out["exp_variance"] = theta.mean, theta.variance
        out["exp_snr"], out["exp_icdf"] = theta.snr, theta.icdf(p.u)
        gradients |= {"kl": out["kl"], "exp_mean": out["exp_mean"]}
    for name, y in gradients.items():
        out[f"{name}_d_loc"], d_scale = _gradients(y, loc, scale)
        out[f"{name}_d_log_scale"] = d_scale.double() * p.scale.double()
    rows = [_gradients(row, loc, scale) for row in out["icdf"]]
    out["sample_d_loc"] = torch.stack([d_loc for d_loc, _ in rows])
    d_scale = torch.stack([d_scale for _, d_scale in rows])
    out["sample_d_log_scale"] = d_scale.double() * p.scale.double()
    return {name: y.detach().double() for name, y in out.items()}


def _log_normalizer(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    from pyro_sbp import special

    return special.log_normalizer(loc, scale, low, high).to(loc.dtype)


def _gradients(y: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(y.sum(), (loc, scale), retain_graph=True)


def errors(p: Points, got: dict[str, Tensor]) -> Iterator[tuple[str, int, float]]:
    """(quantity, point, error) against 110 digits; infinite where a value is NaN or infinite."""

    def error(value: float, truth: mpf, floor: float | mpf = 0) -> float:
        if not math.isfinite(value):
            return INF
        return float(abs(mpf(value) - truth) / max(abs(truth), mpf(floor)))

    one_draw = {name: y.tolist() for name, y in got.items() if y.ndim == 1}
    draws = {name: y.tolist() for name, y in got.items() if y.ndim == 2}
    for i, (loc, scale, low, high) in enumerate(zip(*(x.tolist() for x in p[:4]), strict=True)):
        t = Truth(loc, scale, low, high)
        floors = {
            "log_normalizer": 1,
            "entropy": 1,
            "kl_d_loc": 1e-3 / scale,
            "mean": math.sqrt(t.variance),
        }
        for name, values in one_draw.items():
            if name not in QUANTITIES:
                continue
            floor = floors.get(name, 0)
            if name == "exp_mean_d_log_scale":
                floor = t.exp_mean_d_log_scale_size
            yield name, i, error(values[i], getattr(t, name), floor)
        u = [row[i] for row in p.u.tolist()] if False else p.u[:, i].tolist()
        true_x = [t.icdf(u[k], draws["value"][k][i]) for k in range(DRAWS)]
        d_loc = [t.sample_d_loc(u[k], true_x[k]) for k in range(DRAWS)]
        d_log_scale = [t.sample_d_log_scale(u[k], true_x[k]) for k in range(DRAWS)]
        size_loc = sum(map(abs, d_loc)) / DRAWS
        size_log_scale = sum(map(abs, d_log_scale)) / DRAWS
        for k in range(DRAWS):
            value = draws["value"][k][i]
            floor = 1 if math.isfinite(low) and math.isfinite(high) else 0
            absolute = 1 / max(abs(true_x[k]), mpf(1)) if not floor else 1
            yield "icdf", i, error(value, true_x[k], mpf(10) ** -300) and float(
                abs(mpf(value) - true_x[k]) * absolute
            )
            yield "log_prob", i, error(draws["log_prob"][k][i], t.log_density(value), 1)
            yield "cdf", i, error(draws["cdf"][k][i], t.cdf(value), 1)
            yield "sample_d_loc", i, error(draws["sample_d_loc"][k][i], d_loc[k], size_loc)
            yield (
                "sample_d_log_scale",
                i,
                error(draws["sample_d_log_scale"][k][i], d_log_scale[k], size_log_scale),
            )
            if "exp_icdf" in draws:
                from mpmath import mp

                yield "exp_icdf", i, error(draws["exp_icdf"][k][i], mp.exp(true_x[k]))
