"""Measure the accuracy and the speed of the distributions, for the tables of docs/distributions.md.

    python -m pyro_sbp.experiments.distributions_table [accuracy|comparison|cost] [--points N]

`accuracy` compares the distributions with values in 110 digits. `comparison` does the same for two
constructions that other packages use. `cost` measures times on this machine. Without an argument,
all three run. The first two need mpmath: ``pip install 'pyro-sbp[experiments]'``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sbp import special
from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform, TruncatedNormal
from pyro_sbp.distributions.fast_sampling import quantile, uniform
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.extra import check_installed

if TYPE_CHECKING:
    from mpmath import mpf

__all__ = ["BOX", "QUANTITIES", "SETS", "Points", "errors", "measured", "points"]

INF = math.inf
BOX = (-20.0, 0.0)
#: For each set of points, the bounds, the range of loc, and the share of the points.
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
    """Values of the parameters ``[n]``, and probabilities ``[DRAWS, n]``."""

    loc: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    u: Tensor

    def to(self, dtype: torch.dtype) -> Points:
        return Points(*(x.to(dtype) for x in self))


def points(n: int, bounds: tuple[float, float], locs: tuple[float, float], seed: int = 0) -> Points:
    """Points of which half are a grid, a quarter are random, and a quarter have loc within three
    scales of a bound.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    side = math.ceil(math.sqrt(n / 2))
    grid_loc = torch.linspace(*locs, side, dtype=torch.float64)
    grid_log_scale = torch.linspace(*LOG_SCALE, side, dtype=torch.float64)
    grid = torch.cartesian_prod(grid_loc, grid_log_scale)
    rest = max(n - len(grid), 2)
    log_scale = LOG_SCALE[0] + random(rest) * (LOG_SCALE[1] - LOG_SCALE[0])
    loc = locs[0] + random(rest) * (locs[1] - locs[0])
    ends = torch.tensor([x for x in bounds if math.isfinite(x)], dtype=torch.float64)
    near = ends[torch.arange(rest) % len(ends)] + log_scale.exp() * 6 * (random(rest) - 0.5)
    loc = torch.where(torch.arange(rest) < rest // 2, loc, near).clamp(*locs)
    loc, log_scale = torch.cat([grid[:, 0], loc]), torch.cat([grid[:, 1], log_scale])
    u = random(DRAWS, len(loc))
    u[0] = torch.exp(-20 * u[0])  # one draw far in the lower tail, one far in the upper tail
    u[1] = 1 - torch.exp(-12 * u[1])
    low, high = (torch.full_like(loc, x) for x in bounds)
    return Points(loc, log_scale.exp(), low, high, u)


class Quantity(NamedTuple):
    """A measured quantity: its name, the bounds of its errors, and the floor of its size as text.

    The error is the absolute error divided by the larger of the value and the floor.
    """

    name: str
    bound64: float
    bound32: float
    floor: str


QUANTITIES = {
    "log_normalizer": Quantity("log Z", 1e-12, 3e-7, "1"),
    "entropy": Quantity("entropy", 1e-12, 3e-7, "1"),
    "kl": Quantity("KL", 1e-12, 3e-7, "none"),
    "exp_mean": Quantity("E[theta]", 1e-12, 3e-7, "none"),
    "exp_variance": Quantity("Var[theta]", 1e-12, 3e-7, "none"),
    "exp_snr": Quantity("SNR[theta]", 1e-12, 3e-7, "none"),
    "mean": Quantity("E[x]", 1e-12, 3e-7, "sd[x]"),
    "variance": Quantity("Var[x]", 1e-12, 3e-7, "none"),
    "log_prob": Quantity("log_prob", 1e-12, 3e-7, "1"),
    "cdf": Quantity("cdf", 1e-12, 3e-7, "1"),
    "icdf": Quantity("icdf of x", 1e-11, 2e-6, "absolute"),
    "icdf_one_sided": Quantity("icdf of x, one-sided", 1e-11, 2e-6, "1"),
    "exp_icdf": Quantity("icdf of theta", 1e-11, 3e-7, "none"),
    "kl_d_loc": Quantity("dKL/dloc", 1e-11, 3e-7, "1e-3/scale"),
    "kl_d_log_scale": Quantity("dKL/dlog scale", 1e-12, 3e-7, "none"),
    "exp_mean_d_loc": Quantity("dE[theta]/dloc", 1e-12, 3e-7, "none"),
    "exp_mean_d_log_scale": Quantity("dE[theta]/dlog scale", 1e-12, 3e-7, "sd[theta] sd[z^2]"),
    "mean_d_loc": Quantity("dE[x]/dloc", 1e-12, 3e-7, "none"),
    "sample_d_loc": Quantity("dx/dloc", 1e-9, 3e-7, "its mean"),
    "sample_d_log_scale": Quantity("dx/dlog scale", 1e-9, 3e-7, "its mean"),
}


def measured(p: Points) -> dict[str, Tensor]:
    """Every quantity as computed by the classes in the dtype of the points, in float64: ``[n]`` or
    ``[DRAWS, n]``.
    """
    loc, scale = p.loc.clone().requires_grad_(), p.scale.clone().requires_grad_()
    x = TruncatedNormal(loc, scale, p.low, p.high)
    out = {"mean": x.mean, "variance": x.variance, "entropy": x.entropy(), "value": x.icdf(p.u)}
    value = out["value"].detach()
    out["log_prob"], out["cdf"] = x.log_prob(value), x.cdf(value)
    out["log_normalizer"] = special.log_normalizer(loc, scale, p.low, p.high).to(loc.dtype)
    differentiated = ["mean"]
    if _bounded(p):
        theta = TruncatedLogNormal(loc, scale, p.low, p.high)
        out["kl"] = kl_divergence(theta, TruncatedLogUniform(p.low, p.high))
        out["exp_mean"], out["exp_variance"] = theta.mean, theta.variance
        out["exp_snr"], out["exp_icdf"] = theta.snr, theta.icdf(p.u)
        differentiated += ["kl", "exp_mean"]

    def gradients(y: Tensor) -> tuple[Tensor, Tensor]:
        d_loc, d_scale = torch.autograd.grad(y.sum(), (loc, scale), retain_graph=True)
        return d_loc, d_scale.double() * scale.detach().double()

    for name in differentiated:
        out[f"{name}_d_loc"], out[f"{name}_d_log_scale"] = gradients(out[name])
    rows = zip(*(gradients(row) for row in out["value"]), strict=True)
    out["sample_d_loc"], out["sample_d_log_scale"] = (torch.stack(row) for row in rows)
    return {name: y.detach().double() for name, y in out.items()}


def _bounded(p: Points) -> bool:
    return bool(p.low.isfinite().all() and p.high.isfinite().all())


def _error(value: float, truth: mpf, floor: float | mpf = 0) -> float:
    if not math.isfinite(value):
        return INF
    return float(abs(value - truth) / max(abs(truth), floor))


def errors(p: Points, got: dict[str, Tensor]) -> Iterator[tuple[str, int, float]]:
    """Tuples (quantity, point, error against 110 digits). The error is infinite if a value is NaN
    or infinite.

    Args:
        p: the points at which `got` was measured, in float64.
    """
    from mpmath import mp

    from pyro_sbp.experiments.truncated_normal_truth import Truth

    values = {name: y.tolist() for name, y in got.items()}
    draws = [name for name, y in got.items() if y.ndim == 2]
    bounded = _bounded(p)
    u = p.u.tolist()
    for i, (loc, scale, low, high) in enumerate(zip(*(x.tolist() for x in p[:4]), strict=True)):
        t = Truth(loc, scale, low, high)
        floors = {
            "log_normalizer": 1,
            "entropy": 1,
            "kl_d_loc": 1e-3 / scale,
            "mean": mp.sqrt(t.variance),
        }
        if bounded:
            floors["exp_mean_d_log_scale"] = t.exp_mean_d_log_scale_size
        for name in QUANTITIES.keys() & values.keys() - set(draws):
            yield name, i, _error(values[name][i], getattr(t, name), floors.get(name, 0))
        x = [t.icdf(u[k][i], values["value"][k][i]) for k in range(DRAWS)]
        for name, truth in (
            ("sample_d_loc", t.sample_d_loc),
            ("sample_d_log_scale", t.sample_d_log_scale),
        ):
            true = [truth(u[k][i], x[k]) for k in range(DRAWS)]
            size = sum(map(abs, true)) / DRAWS
            for k in range(DRAWS):
                yield name, i, _error(values[name][k][i], true[k], size)
        for k in range(DRAWS):
            value = values["value"][k][i]
            yield "log_prob", i, _error(values["log_prob"][k][i], t.log_density(value), 1)
            yield "cdf", i, _error(values["cdf"][k][i], t.cdf(value), 1)
            if bounded:
                size = float(abs(x[k])) if x[k] else 1.0
                yield "icdf", i, _error(value, x[k]) * size
                yield "exp_icdf", i, _error(values["exp_icdf"][k][i], mp.exp(x[k]))
            else:
                yield "icdf_one_sided", i, _error(value, x[k], 1)


def print_accuracy(n: int) -> None:
    """Print table 1: the largest error of every quantity and its position."""
    from pyro_sbp.experiments.truncated_normal_truth import DIGITS

    count = sum(int(n * share) for _, _, share in SETS)
    print(f"Largest errors against {DIGITS} digits over {count:,} points, log scale in [-10, 5]:")
    for bounds, locs, share in SETS:
        print(f"  {int(n * share):6,} points: bounds {bounds}, loc in {list(locs)}")
    print("Errors are absolute, over the larger of the value and the floor.\n")
    print(
        "| quantity | floor | dtype | largest error | bound | held | at loc | log scale | bounds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    worst: dict[tuple[str, torch.dtype], tuple[float, float, float, tuple[float, float]]] = {}
    for dtype in (torch.float64, torch.float32):
        for bounds, locs, share in SETS:
            p = points(int(n * share), bounds, locs).to(dtype)
            got, p = measured(p), p.to(torch.float64)
            for name, i, error in errors(p, got):
                if not error <= worst.get((name, dtype), (-1.0,))[0]:
                    where = p.loc[i].item(), p.scale[i].log().item(), bounds
                    worst[name, dtype] = (error, *where)
    for name, q in QUANTITIES.items():
        for dtype, bound in ((torch.float64, q.bound64), (torch.float32, q.bound32)):
            error, loc, log_scale, bounds = worst[name, dtype]
            held = "yes" if error <= bound else "NO"
            print(
                f"| {q.name} | {q.floor} | {str(dtype)[6:]} | {error:.1e} | {bound:.0e} | {held} "
                f"| {loc:.4g} | {log_scale:.3g} | {bounds} |"
            )


# The constructions that other packages use


def published(p: Points, phi: Callable, phi_inverse: Callable) -> dict[str, Tensor]:
    """The textbook formulas of arXiv:1705.07283, in the dtype of the points."""
    loc, scale = p.loc.clone().requires_grad_(), p.scale.clone().requires_grad_()
    alpha, beta = (p.low - loc) / scale, (p.high - loc) / scale
    z = phi(beta) - phi(alpha)

    def density(x: Tensor) -> Tensor:
        return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def moment(k: int) -> Tensor:
        mass = (phi(beta - k * scale) - phi(alpha - k * scale)) / z
        return torch.exp(k * loc + k * k * scale * scale / 2) * mass

    kl = (p.high - p.low).log() - scale.log() - z.log() - 0.5 * math.log(2 * math.pi * math.e)
    kl = kl - (alpha * density(alpha) - beta * density(beta)) / (2 * z)
    mean = moment(1)
    out = {
        "kl": kl,
        "exp_mean": mean,
        "exp_snr": mean / (moment(2) - mean * mean).sqrt(),
        "exp_icdf": (loc + scale * phi_inverse(phi(alpha) + p.u * z)).exp(),
    }
    out["kl_d_loc"], d_scale = torch.autograd.grad(kl.sum(), (loc, scale))
    out["kl_d_log_scale"] = d_scale * p.scale
    return {name: y.detach().double() for name, y in out.items()}


CONSTRUCTIONS: dict[str, Callable[[Points], dict[str, Tensor]]] = {
    "published formulas": lambda p: published(p, torch.special.ndtr, torch.special.ndtri),
    "erf / erfinv": lambda p: published(
        p,
        lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        lambda u: math.sqrt(2) * torch.erfinv(2 * u - 1),
    ),
    "pyro_sbp": measured,
}
COMPARED = ("kl", "kl_d_loc", "kl_d_log_scale", "exp_mean", "exp_snr", "exp_icdf")


def print_comparison(n: int) -> None:
    """Print table 2: how often the other constructions and these classes are wrong in float32."""
    from pyro_sbp.experiments.truncated_normal_truth import Truth

    bounds, locs, _ = SETS[0]
    p = points(n, bounds, locs).to(torch.float32)
    exact = p.to(torch.float64)
    truths = [Truth(*x) for x in zip(*(x.tolist() for x in exact[:4]), strict=True)]
    true = {name: [getattr(t, name) for t in truths] for name in COMPARED if name != "exp_icdf"}
    # The quantiles of the classes in float64 are accurate to 1e-11, see table 1.
    true_theta = TruncatedLogNormal(*exact[:4]).icdf(exact.u)
    print(f"Float32, {n:,} points of bounds {bounds}, loc in {list(locs)}: percent of the points")
    print("where the value is NaN or infinite / where it is that or off by more than 1 %.\n")
    print("| quantity | " + " | ".join(CONSTRUCTIONS) + " |")
    print("|---|" + "---|" * len(CONSTRUCTIONS))
    results = {name: construction(p) for name, construction in CONSTRUCTIONS.items()}
    for name in COMPARED:
        cells = []
        for got in results.values():
            value = got[name]
            if name == "exp_icdf":
                lost = ~value.isfinite()
                off = lost | ((value - true_theta).abs() > 0.01 * true_theta)
                lost, off = lost.any(0), off.any(0)
            else:
                lost = ~value.isfinite()
                floor = [1e-3 / t.scale if name == "kl_d_loc" else 0 for t in truths]
                pairs = zip(value.tolist(), true[name], floor, strict=True)
                off = torch.tensor([not _error(*pair) <= 0.01 for pair in pairs])
            cells.append(f"{100 * lost.double().mean():.1f} / {100 * off.double().mean():.1f}")
        print(f"| {QUANTITIES[name].name} | " + " | ".join(cells) + " |")


# Cost


def _milliseconds(function: Callable[[], object], device: torch.device, repeats: int = 30) -> float:
    """Median time of a call, after two warm-up calls."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def _lenet5_step(device: torch.device, batch_size: int) -> Callable[[], None]:
    from pyro_sbp.networks import LeNet5

    net = LeNet5().to(device)
    optimizer = torch.optim.Adam(net.parameters())
    x = torch.rand(batch_size, 1, 28, 28, device=device)
    y = torch.randint(10, (batch_size,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def print_cost(device: torch.device) -> None:
    """Print table 3: times of forward and backward, relative to plain normal draws and to a
    training step of LeNet-5.
    """
    generator = torch.Generator().manual_seed(0)

    def parameters(units: int) -> tuple[Tensor, Tensor]:
        loc = torch.rand(units, generator=generator) * 25 - 22
        scale = (torch.rand(units, generator=generator) * 6 - 5).exp()
        return loc.to(device).requires_grad_(), scale.to(device).requires_grad_()

    step = _milliseconds(_lenet5_step(device, 128), device)
    where = f"{torch.get_num_threads()} thread(s)"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    print(f"\nOn {device.type}, {where}: a training step of LeNet-5 (dense, Adam, 128 examples)")
    print(f"takes {step:.2f} ms. Float32, forward and backward, median of 30.\n")
    print("| what | ms | times torch.randn | % of a LeNet-5 step |")
    print("|---|---|---|---|")

    def row(name: str, shape: tuple[int, ...], function: Callable[[], Tensor]) -> float:
        randn = _milliseconds(lambda: torch.randn(shape, device=device), device)
        ms = _milliseconds(lambda: function().sum().backward(), device)
        print(f"| {name} | {ms:.2f} | {ms / randn:.0f} | {100 * ms / step:.1f} |")
        return ms

    low, high = (torch.full((), x, device=device) for x in BOX)
    prior = TruncatedLogUniform(low, high, validate_args=False)

    def rows(loc: Tensor, scale: Tensor, shape: tuple[int, ...]) -> None:
        def q() -> TruncatedLogNormal:
            return TruncatedLogNormal(loc, scale, low, high, validate_args=False).expand(shape)

        size = " x ".join(f"{n:,}" for n in shape)
        row(f"KL, {size}", shape, lambda: kl_divergence(q(), prior.expand(shape)))
        if len(shape) == 1:
            row(f"SNR, {size}", shape, lambda: q().snr)
        row(f"draw, {size}", shape, lambda: q().rsample())

    loc, scale = parameters(1_370)
    rows(loc, scale, (1_370,))
    rows(*parameters(4_000), (4_000,))
    shape = (128, 1_370)
    rows(loc, scale, shape)
    u = uniform(torch.Size(shape), device)
    row("draw at given u, 128 x 1,370", shape, lambda: quantile(u, loc, scale, low, high))
    row("same, exact icdf", shape, lambda: special.icdf(u, loc, scale, low, high))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    tables = ("accuracy", "comparison", "cost")
    parser.add_argument(
        "table", nargs="?", choices=tables, help="the table to print; by default all"
    )
    parser.add_argument("--points", type=int, default=4000, help="points of the bounds (-20, 0)")
    options = parser.parse_args(arguments)
    chosen = (options.table,) if options.table else tables
    if chosen != ("cost",):
        try:
            check_installed("mpmath")
        except RequestError as error:
            parser.error(str(error))
    if "accuracy" in chosen:
        print_accuracy(options.points)
        print()
    if "comparison" in chosen:
        print_comparison(options.points)
    if "cost" in chosen:
        print_cost(torch.device("cpu"))
        if torch.cuda.is_available():
            print_cost(torch.device("cuda"))


if __name__ == "__main__":
    main()
