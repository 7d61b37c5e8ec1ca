"""The posterior of the regression in docs/distributions.md, computed by its guide and by NUTS.

`python -m pyro_sbp.experiments.posteriors_by_nuts [SEED ...]` prints one row for each data seed and
coefficient.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.optim import ClippedAdam
from torch import Tensor

import pyro_sbp as sbp

__all__ = ["Row", "main", "rows"]

TRUTH = (0.9, 0.0, 0.4, 0.0, 0.0)


class Row(NamedTuple):
    """A coefficient: its true value, and its mean and standard deviation by the guide and by
    NUTS.
    """

    truth: float
    guide: tuple[float, float]
    nuts: tuple[float, float]


def _model(x: Tensor, y: Tensor) -> None:
    with pyro.plate("features", x.shape[1]):
        theta = pyro.sample("theta", sbp.distributions.TruncatedLogUniform(-20.0, 0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(theta @ x.T, 0.5), obs=y)


def rows(
    seed: int, *, steps: int = 1500, samples: int = 400, warmup: int = 200, size: int = 300
) -> Iterator[Row]:
    """The coefficients of the data set of a seed, in order."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    x = torch.randn(size, len(TRUTH))
    y = x @ torch.tensor(TRUTH) + 0.5 * torch.randn(size)
    guide = sbp.TruncatedLogNormalGuide(_model, x, y, init_loc=-3.0, init_log_scale=-2.0)
    decay = {"lr": 0.05, "lrd": 0.3 ** (1 / steps), "clip_norm": float("inf")}
    elbo = TraceMeanField_ELBO(num_particles=10, vectorize_particles=True)
    svi = SVI(_model, guide, ClippedAdam(decay), elbo)
    for _ in range(steps):
        svi.step(x, y)
    q = guide.posteriors()["theta"]
    # In float64, because rounding in a float32 potential is too large for small steps.
    start = init_to_value(values={"theta": torch.full((len(TRUTH),), 0.05).double()})
    torch.set_default_dtype(torch.float64)
    try:
        mcmc = MCMC(
            NUTS(_model, init_strategy=start, jit_compile=True, ignore_jit_warnings=True),
            num_samples=samples,
            warmup_steps=warmup,
            disable_progbar=True,
        )
        mcmc.run(x.double(), y.double())
    finally:
        torch.set_default_dtype(torch.float32)
    drawn = mcmc.get_samples()["theta"]
    columns = zip(
        TRUTH,
        zip(q.mean.tolist(), q.stddev.tolist(), strict=True),
        zip(drawn.mean(0).tolist(), drawn.std(0).tolist(), strict=True),
        strict=True,
    )
    for truth, of_guide, of_nuts in columns:
        yield Row(truth, of_guide, of_nuts)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2, 3])
    options = parser.parse_args(arguments)
    print("| data seed | coefficient | guide: mean, deviation | NUTS: mean, deviation |")
    print("|---|---|---|---|")
    for seed in options.seeds:
        for row in rows(seed):
            cells = (f"{mean:.4f}, {deviation:.4f}" for mean, deviation in (row.guide, row.nuts))
            print(f"| {seed} | {row.truth:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
