"""The truncated normal against NumPyro, SciPy and hand-written erf: accuracy and time in one run.

    python -m pyro_sbp.experiments.distributions_against [--points N] [--rounds N]

Accuracy is measured for float32 parameters against values in 110 digits. SciPy computes in float64.
Times are milliseconds of processor time on one thread for a forward and a backward pass over
100,000 elements: the median over rounds that measure all libraries in turn. SciPy has no gradients,
so its time is that of the values only. The program needs mpmath and SciPy, and NumPyro for the
columns of NumPyro: ``pip install mpmath scipy numpyro``. Without NumPyro, these columns are omitted
with a message.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Uniform, kl_divergence

from pyro_sbp.distributions import TruncatedNormal
from pyro_sbp.distributions.fast_sampling import quantile
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.distributions_table import BOX, Points, points
from pyro_sbp.experiments.extra import check_installed

__all__ = ["main"]

QUANTITIES = ("log_prob", "one-sided log_prob", "KL to uniform", "sample")
NUM_TIMED = 100_000
#: A function from points, values and one-sided values to the quantities of a library, ``[n]`` each.
Library = Callable[[Points, Tensor, Tensor], dict[str, Callable[[], Any]]]


def ours(p: Points, x: Tensor, x_one: Tensor) -> dict[str, Callable[[], Tensor]]:
    def two_sided() -> TruncatedNormal:
        return TruncatedNormal(p.loc, p.scale, *BOX, validate_args=False)

    def one_sided() -> TruncatedNormal:
        return TruncatedNormal(p.loc, p.scale, BOX[0], math.inf, validate_args=False)

    low, high = (torch.tensor(bound) for bound in BOX)
    prior = Uniform(low, high, validate_args=False)
    return {
        "log_prob": lambda: two_sided().log_prob(x),
        "one-sided log_prob": lambda: one_sided().log_prob(x_one),
        "KL to uniform": lambda: kl_divergence(two_sided(), prior),
        # The computation of rsample() from its uniform numbers.
        "sample": lambda: quantile(p.u[2].double(), p.loc, p.scale, low, high, dtype=torch.float32),
    }


def by_hand(p: Points, x: Tensor, x_one: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The textbook formulas with erf, and with log_ndtr if one bound is infinite."""
    low, high = BOX
    log_root = 0.5 * math.log(2 * math.pi)

    def phi(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))

    def density(z: Tensor) -> Tensor:
        return torch.exp(-0.5 * z * z - log_root)

    def ends() -> tuple[Tensor, Tensor, Tensor]:
        alpha, beta = (low - p.loc) / p.scale, (high - p.loc) / p.scale
        return alpha, beta, phi(beta) - phi(alpha)

    def normal(x: Tensor) -> Tensor:
        return -0.5 * ((x - p.loc) / p.scale).square() - p.scale.log() - log_root

    def kl() -> Tensor:
        alpha, beta, mass = ends()
        moment = (alpha * density(alpha) - beta * density(beta)) / (2 * mass)
        return math.log(high - low) - (p.scale * mass).log() - log_root - 0.5 - moment

    def sample() -> Tensor:
        alpha, _, mass = ends()
        z = math.sqrt(2) * torch.erfinv(2 * (phi(alpha) + p.u[2] * mass) - 1)
        return p.loc + p.scale * z

    return {
        "log_prob": lambda: normal(x) - ends()[2].log(),
        "one-sided log_prob": lambda: (
            normal(x_one) - torch.special.log_ndtr((p.loc - low) / p.scale)
        ),
        "KL to uniform": kl,
        "sample": sample,
    }


def scipy(p: Points, x: Any, x_one: Any) -> dict[str, Callable[[], Any]]:
    import numpy as np
    from scipy.stats import truncnorm

    np.seterr(all="ignore")  # values that are not finite are counted
    tensors = (p.loc, p.scale, p.u[2], x, x_one)
    loc, scale, u, x, x_one = (y.detach().double().numpy() for y in tensors)
    alpha, beta = ((bound - loc) / scale for bound in BOX)

    def kl() -> Any:
        return math.log(BOX[1] - BOX[0]) - truncnorm.entropy(alpha, beta, loc, scale)

    return {
        "log_prob": lambda: truncnorm.logpdf(x, alpha, beta, loc, scale),
        "one-sided log_prob": lambda: truncnorm.logpdf(x_one, alpha, math.inf, loc, scale),
        "KL to uniform": kl,
        "sample": lambda: truncnorm.ppf(u, alpha, beta, loc, scale),
    }


def numpyro(p: Points, x: Any, x_one: Any) -> dict[str, Callable[[], Any]]:
    """The values and gradients of NumPyro, compiled. It has no KL divergence of a truncated
    normal.
    """
    import jax
    from numpyro.distributions import TruncatedNormal as Theirs

    loc, scale, u, x, x_one = (
        jax.numpy.asarray(y.detach().numpy()) for y in (*p[:2], p.u[2], x, x_one)
    )

    def compiled(function: Callable[[Any, Any], Any]) -> Callable[[], Any]:
        def total(loc: Any, scale: Any) -> tuple[Any, Any]:
            values = function(loc, scale)
            return values.sum(), values

        of = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        return lambda: jax.block_until_ready(of(loc, scale))[0][1]

    low, high = BOX
    return {
        "log_prob": compiled(lambda m, s: Theirs(m, s, low=low, high=high).log_prob(x)),
        "one-sided log_prob": compiled(lambda m, s: Theirs(m, s, low=low).log_prob(x_one)),
        "sample": compiled(lambda m, s: Theirs(m, s, low=low, high=high).icdf(u)),
    }


def _values(p: Points) -> tuple[Tensor, Tensor]:
    """A value for every element, and one for the distribution without an upper bound."""
    p = p.to(torch.float64)
    value = TruncatedNormal(p.loc, p.scale, *BOX).icdf(p.u[2])
    one = TruncatedNormal(p.loc, p.scale, BOX[0], math.inf).icdf(p.u[2])
    return value.float(), one.float()


def _truths(p: Points, x: Tensor, x_one: Tensor) -> dict[str, Tensor]:
    """The true values in float64, ``[n]`` each. For quantiles they are those of the classes in
    float64, which are accurate to 1e-11.
    """
    from pyro_sbp.experiments.truncated_normal_truth import Truth

    p = p.to(torch.float64)
    rows = list(zip(*(y.tolist() for y in (p.loc, p.scale, x, x_one)), strict=True))
    one_sided = [Truth(loc, scale, BOX[0], math.inf).log_density(y) for loc, scale, _, y in rows]
    two_sided = [Truth(loc, scale, *BOX) for loc, scale, _, _ in rows]
    log_prob = [t.log_density(row[2]) for t, row in zip(two_sided, rows, strict=True)]
    exact = {
        "log_prob": log_prob,
        "one-sided log_prob": one_sided,
        "KL to uniform": [t.kl for t in two_sided],
    }
    found = {name: torch.tensor([float(y) for y in ys]).double() for name, ys in exact.items()}
    return found | {"sample": TruncatedNormal(p.loc, p.scale, *BOX).icdf(p.u[2])}


def _percent_off(value: Any, truth: Tensor) -> float:
    """The percentage of values that are NaN, infinite, or wrong by more than 1e-3 times max(1,
    value).
    """
    value = value.detach() if isinstance(value, Tensor) else torch.tensor(value.tolist())
    error = (value.double() - truth).abs()
    return 100 * (~(error <= 1e-3 * truth.abs().clamp_min(1))).double().mean().item()


def _timed(libraries: dict[str, Library], rounds: int) -> dict[tuple[str, str], float]:
    """Median milliseconds for every library and quantity, at points where the textbook formulas are
    finite.
    """
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(4, NUM_TIMED, generator=generator)
    loc, scale = u[0] * 16 - 18, u[1] * 5 + 1
    leaves = loc.requires_grad_(), scale.requires_grad_()
    low, high = (torch.full_like(u[0], bound) for bound in BOX)
    p = Points(*leaves, low, high, u)
    x = _values(Points(loc.detach(), scale.detach(), low, high, u))
    functions = {
        (name, quantity): function
        for name, library in libraries.items()
        for quantity, function in library(p, *x).items()
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
    # After one large allocation the allocator keeps freed memory, as in any training.
    torch.zeros(1 << 22, device="cpu")
    for index in range(rounds + 1):
        for key, function in functions.items():
            start = time.process_time()
            value = function()
            if isinstance(value, Tensor):
                value.sum().backward()
            if index:
                times[key].append(1e3 * (time.process_time() - start))
    return {key: statistics.median(values) for key, values in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--points", type=int, default=1000, help="number of points for the accuracy"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the timing")
    options = parser.parse_args(arguments)
    try:
        for package in ("mpmath", "scipy"):
            check_installed(package)
    except RequestError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    libraries: dict[str, Library] = {"pyro-sbp": ours, "by hand": by_hand, "SciPy": scipy}
    if find_spec("numpyro"):
        libraries["NumPyro, jit"] = numpyro
    else:
        print("NumPyro is not installed, so its column is missing: pip install numpyro\n")
    p = points(options.points, BOX, (-25.0, 5.0)).to(torch.float32)
    x = _values(p)
    truths, times = _truths(p, *x), _timed(libraries, options.rounds)
    found = {name: library(p, *x) for name, library in libraries.items()}
    print(
        f"Bounds {BOX}: percent of {len(p.loc):,} points (loc in [-25, 5], log scale in [-10, 5])"
    )
    print("that are NaN, infinite or off by more than 1e-3 of max(1, value); milliseconds of")
    print(f"forward and backward over {NUM_TIMED:,} elements.\n")
    print("| quantity | " + " | ".join(libraries) + " |")
    print("|---|" + "---|" * len(libraries))
    for quantity in QUANTITIES:
        cells = []
        for name, functions in found.items():
            if quantity not in functions:
                cells.append("none")
                continue
            off = _percent_off(functions[quantity](), truths[quantity])
            cells.append(f"{off:.1f} %, {times[name, quantity]:.1f} ms")
        print(f"| {quantity} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
