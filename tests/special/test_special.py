"""The scalar functions against 110 digits, and what autograd, compile and vmap make of them."""

import math
import os
import subprocess
import sys

import pytest
import torch
from mpmath import mp, mpf

from pyro_sbp import special
from pyro_sbp.experiments import distributions_table as table

#: Points of the bounds (-20, 0); 4,000 take a minute, the script prints their table.
NUM_POINTS = int(os.environ.get("PYRO_SBP_ACCURACY_POINTS", "400"))
BOUNDS = torch.tensor(-20.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
LOC = torch.tensor([-24.0, -19.9, -12.0, -9.5, -5.0, -0.3, 0.02, 1.0, 4.0], dtype=torch.float64)
SCALE = torch.tensor([0.4, 0.05, 3.0, 100.0, 0.5, 1.5, 0.1, 0.01, 30.0], dtype=torch.float64)
SLOW = pytest.mark.slow
U = torch.tensor([0.3, 0.9, 0.01, 0.5, 0.7, 0.999, 0.2, 0.6, 0.4], dtype=torch.float64)
X = torch.tensor([-19.9, -19.8, -3.0, -7.0, -4.0, -0.1, -0.2, -1e-5, -1.0], dtype=torch.float64)

OF_PARAMETERS = {
    name: getattr(special, name)
    for name in (
        "log_normalizer",
        "entropy",
        "kl_to_uniform",
        "mean",
        "variance",
        "exp_mean",
        "exp_variance",
        "exp_snr",
    )
}
OF_PARAMETERS["icdf"] = lambda *parameters: special.icdf(U, *parameters)
OF_PARAMETERS["cdf"] = lambda *parameters: special.cdf(X, *parameters)
OF_PARAMETERS["log_density"] = lambda *parameters: special.log_density(X, *parameters)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bounds, locs, share", table.SETS, ids=str)
def test_accuracy(bounds, locs, share, dtype):
    p = table.points(int(NUM_POINTS * share), bounds, locs, seed=1).to(dtype)
    got = table.measured(p)
    worst = dict.fromkeys(table.QUANTITIES, 0.0)
    for name, _, error in table.errors(p.to(torch.float64), got):
        worst[name] = max(worst[name], error)
    limits = {
        name: q.bound64 if dtype == torch.float64 else q.bound32
        for name, q in table.QUANTITIES.items()
    }
    assert {name: error for name, error in worst.items() if not error <= limits[name]} == {}
    assert sum(error > 0 for error in worst.values()) >= 9


@pytest.mark.parametrize("x", [-1.0, 0.0, 0.5, 5.0, 15.9, 16.1, 100.0, 1e5, 1e100])
def test_mills_ratio(x):
    mp.dps = 250
    true = mp.sqrt(mp.pi / 2) * mp.exp(mpf(x) ** 2 / 2) * mp.erfc(mpf(x) / mp.sqrt(2))
    if x == 1e100:  # beyond what mpmath can exponentiate: 1/x - 1/x^3 + ...
        true = 1 / mpf(x) - 1 / mpf(x) ** 3
    argument = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    ratio = special.mills_ratio(argument)
    (slope,) = torch.autograd.grad(ratio, argument)
    assert abs(mpf(ratio.item()) / true - 1) < 1e-14
    assert abs(mpf(slope.item()) / (mpf(x) * true - 1) - 1) < 1e-12
    assert abs(mpf(special.mean_excess(argument).item()) / (1 / true - mpf(x)) - 1) < 1e-12


@pytest.mark.parametrize("name", OF_PARAMETERS)
def test_gradcheck(name):
    loc = LOC.clone().requires_grad_()

    def function(loc, log_scale):
        return OF_PARAMETERS[name](loc, log_scale.exp(), *BOUNDS)

    inputs = loc, SCALE.log().requires_grad_()
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(OF_PARAMETERS.keys() - {"log_density"}))
def test_a_second_derivative_is_refused(name):
    # Even where the gradient is only a part of the loss: it must not count as a constant.
    loc = LOC.clone().requires_grad_()
    (first,) = torch.autograd.grad(
        OF_PARAMETERS[name](loc, SCALE, *BOUNDS).sum(), loc, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once differentiable"):
        (loc.sum() + first.square().sum()).backward()


@pytest.mark.parametrize("low, high", [(-1.0, math.inf), (-math.inf, 2.0), (-math.inf, math.inf)])
@pytest.mark.parametrize("name", ["log_normalizer", "entropy", "mean", "variance", "icdf"])
def test_gradcheck_with_infinite_bounds(name, low, high):
    bounds = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    loc = torch.tensor([-3.0, -1.0, 0.2, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7], dtype=torch.float64)

    def function(loc, log_scale):
        parameters = loc, log_scale.exp(), *bounds
        return special.icdf(u, *parameters) if name == "icdf" else OF_PARAMETERS[name](*parameters)

    assert torch.autograd.gradcheck(function, (loc, log_scale), atol=1e-7)


def test_gradients_in_the_value():
    parameters = LOC, SCALE, *BOUNDS
    for function, value in (
        (special.log_density, X),
        (special.cdf, X),
        (special.icdf, U),
    ):
        argument = value.clone().requires_grad_()
        # Steps of 1e-6 are too long where the density changes over 1e-4: loc 1, scale 0.01.
        assert torch.autograd.gradcheck(
            lambda v, function=function: function(v, *parameters), argument, eps=1e-8, rtol=1e-4
        )


def test_kl_between_truncated_normals_gradcheck():
    q = torch.tensor([-21.0, -18.0, -10.0, 0.0, -5.5, 1.0, 0.5, 0.2, -4.0], dtype=torch.float64)
    scale_q = torch.tensor([0.5, 0.3, 2.0, 50.0, 0.6, 3.0, 0.2, 0.1, 20.0], dtype=torch.float64)
    inputs = tuple(x.clone().requires_grad_() for x in (LOC, SCALE.log(), q, scale_q.log()))

    def function(loc, log_scale, loc_q, log_scale_q):
        return special.kl_to_truncated_normal(
            loc, log_scale.exp(), *BOUNDS, loc_q, log_scale_q.exp(), *BOUNDS
        )

    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-5, rtol=1e-5)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", OF_PARAMETERS)
def test_vmap_gives_the_same(name):
    if name in ("icdf", "cdf", "log_density"):
        value, of = (U if name == "icdf" else X), getattr(special, name)

        def function(value, loc, scale):
            return of(value, loc, scale, *BOUNDS)

        arguments = value, LOC, SCALE
    else:

        def function(loc, scale):
            return OF_PARAMETERS[name](loc, scale, *BOUNDS)

        arguments = LOC, SCALE
    assert_same(torch.func.vmap(function)(*arguments), function(*arguments))
    last = len(arguments) - 1
    gradient = torch.func.vmap(torch.func.grad(function, argnums=last))(*arguments)
    leaf = SCALE.clone().requires_grad_()
    (eager,) = torch.autograd.grad(function(*arguments[:-1], leaf).sum(), leaf)
    assert_same(gradient, eager)


@pytest.mark.parametrize(
    "name",
    [
        *("exp_snr", "log_density"),
        *(pytest.param(n, marks=SLOW) for n in ("kl_to_uniform", "exp_mean", "icdf", "cdf")),
    ],
)
def test_compile_without_breaks_gives_the_same(name):
    # With PYRO_SBP_INDUCTOR=1 through the code generator too, half a minute for each.
    backend = "inductor" if os.environ.get("PYRO_SBP_INDUCTOR") else "aot_eager"

    def function(loc, scale):
        return OF_PARAMETERS[name](loc, scale, *BOUNDS)

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend=backend)):
        loc, scale = LOC.clone().requires_grad_(), SCALE.clone().requires_grad_()
        value = f(loc, scale)
        results.append((value, *torch.autograd.grad(value.sum(), (loc, scale))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-12)


def test_imports_torch_only():
    code = (
        "import sys, pyro_sbp.special; assert 'torch' in sys.modules and 'pyro' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OF_PARAMETERS)
def test_cuda_gives_the_same_without_a_host_sync(name):
    arguments = [x.cuda() for x in (LOC, SCALE, *BOUNDS)]
    first = {"icdf": [U], "cdf": [X], "log_density": [X]}.get(name, [])
    function, first = getattr(special, name), [x.cuda() for x in first]
    function(*first, *arguments)  # the nodes are copied to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = function(*first, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(
        value.cpu(), OF_PARAMETERS[name](LOC, SCALE, *BOUNDS), rtol=1e-11, atol=1e-13
    )
