"""Derivatives in the bounds, of second order and in forward mode."""

import math

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from pyro_sbp import special

# Forward mode imports what torch itself compiles by torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
INF = math.inf
#: Loc below, inside and above the bounds; scales from a tenth of the width to a hundred times it.
LOC = torch.tensor([-4.0, -0.5, 0.1, 0.8, 3.0, 0.3], dtype=torch.float64)
SCALE = torch.tensor([1.0, 0.3, 2.0, 0.2, 0.7, 100.0], dtype=torch.float64)
LOW = torch.tensor([-1.0, -2.0, -1.5, -0.5, -1.0, 0.0], dtype=torch.float64)
HIGH = torch.tensor([1.0, 0.5, 1.0, 2.0, 1.5, 1.0], dtype=torch.float64)
U = torch.tensor([0.3, 0.9, 0.05, 0.5, 0.7, 0.2], dtype=torch.float64)
X = LOW + U * (HIGH - LOW)
STEP = torch.tensor([0.3, -0.7, 0.2, 1.1, -0.4, 0.9], dtype=torch.float64)

FUNCTIONS = {
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
FUNCTIONS |= {
    "log_density": lambda *p: special.log_density(X, *p),
    "cdf": lambda *p: special.cdf(X, *p),
    "icdf": lambda *p: special.icdf(U, *p),
    "kl_from": lambda *p: special.kl_to_truncated_normal(*p, LOC + 1, SCALE, LOW - 1, HIGH + 1),
    "kl_to": lambda *p: special.kl_to_truncated_normal(
        LOC + 1, 0.3 + 0 * SCALE, LOW + 0.1, HIGH - 0.1, *p
    ),
}
EACH = pytest.mark.parametrize("name", FUNCTIONS)


@EACH
def test_gradients_in_the_bounds(name):
    low, high = LOW.clone().requires_grad_(), HIGH.clone().requires_grad_()

    def function(low, high):
        return FUNCTIONS[name](LOC, SCALE, low, high)

    assert torch.autograd.gradcheck(function, (low, high), eps=1e-6, atol=1e-7, rtol=1e-6)


def test_gradients_in_the_bounds_in_the_tails_are_the_closed_form():
    # d log q / d low is the density at low: the hazard 1 / R of mpmath where high is infinite.
    loc = torch.tensor([0.0, -10.0, -1e4], dtype=torch.float64)
    low = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    high = torch.tensor(INF, dtype=torch.float64, requires_grad=True)
    value = special.log_density(low.detach() + 1e-6, loc, torch.ones_like(loc), low, high)
    d_low, d_high = torch.autograd.grad(value.sum(), (low, high))
    hazard = 1 / special.mills_ratio(-loc)
    torch.testing.assert_close(d_low, hazard, rtol=1e-11, atol=0)
    assert d_high == 0


def test_outside_of_the_bounds_nothing_depends_on_them():
    low = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    parameters = torch.zeros(2).double(), torch.ones(2).double(), low, torch.ones(2).double()
    for function in (special.log_density, special.cdf):
        assert torch.autograd.grad(function(x, *parameters).sum(), low)[0] == 0


def test_second_derivatives_of_the_log_density():
    inputs = tuple(x.clone().requires_grad_() for x in (X, LOC, SCALE.log(), LOW, HIGH))

    def function(x, loc, log_scale, low, high):
        return special.log_density(x, loc, log_scale.exp(), low, high)

    assert torch.autograd.gradgradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_the_second_derivative_in_the_value_is_that_of_the_normal():
    for loc in (-24.0, -3.0, 5.0):
        x = torch.tensor([-19.99, -7.0, -0.01, 1.0], dtype=torch.float64, requires_grad=True)
        parameters = [torch.tensor(p, dtype=torch.float64) for p in (loc, 0.5, -20.0, 0.0)]
        value = special.log_density(x, *parameters).sum()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(second, torch.tensor([-4.0, -4.0, -4.0, 0.0]).double())


def test_a_third_derivative_is_refused():
    x = X.clone().requires_grad_()
    value = special.log_density(x, LOC, SCALE, LOW, HIGH).sum()
    for _ in range(2):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives, except for log_density"):
        value.sum().backward()


@EACH
def test_forward_mode_is_the_transpose(name):
    parameters = LOC, SCALE, LOW, HIGH
    _, along = jvp(FUNCTIONS[name], parameters, (STEP, STEP.flip(0), 0.1 * STEP, -0.2 * STEP))
    leaves = [x.clone().requires_grad_() for x in parameters]
    grads = torch.autograd.grad(FUNCTIONS[name](*leaves).sum(), leaves)
    steps = STEP, STEP.flip(0), 0.1 * STEP, -0.2 * STEP
    expected = sum(g * s for g, s in zip(grads, steps, strict=True))
    torch.testing.assert_close(along, expected, rtol=1e-9, atol=1e-12)


def test_forward_mode_in_the_probability_and_the_value():
    for function, x in ((special.icdf, U), (special.cdf, X), (special.log_density, X)):
        _, along = jvp(lambda v, f=function: f(v, LOC, SCALE, LOW, HIGH), (x,), (STEP,))
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(leaf, LOC, SCALE, LOW, HIGH).sum(), leaf)
        torch.testing.assert_close(along, slope * STEP, rtol=1e-12, atol=0)


@pytest.mark.parametrize("of", [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))])
def test_hessian_of_the_log_density(of):
    def function(p):
        return special.log_density(X[1], p[0], p[1], LOW[1], HIGH[1])

    p = torch.stack([LOC[1], SCALE[1]])
    eps = 1e-6
    steps = torch.eye(2, dtype=torch.float64) * eps
    expected = torch.stack([(grad(function)(p + s) - grad(function)(p - s)) for s in steps])
    torch.testing.assert_close(of(function)(p), expected / (2 * eps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mean", "kl_to_uniform", "icdf"])
@pytest.mark.parametrize(
    "of",
    [
        hessian,
        lambda f: jacrev(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacfwd(jacfwd(f)),
    ],
)
def test_other_second_derivatives_are_refused_in_every_mode(name, of):
    with pytest.raises(RuntimeError, match="no second derivatives"):
        of(lambda loc: FUNCTIONS[name](loc, SCALE, LOW, HIGH).sum())(LOC)


def test_vmap_of_gradients_in_the_bounds():
    each = vmap(grad(special.mean, argnums=2))(LOC, SCALE, LOW, HIGH)
    low = LOW.clone().requires_grad_()
    (together,) = torch.autograd.grad(special.mean(LOC, SCALE, low, HIGH).sum(), low)
    torch.testing.assert_close(each, together, rtol=1e-11, atol=0)
    # The gradient is asked for outside of vmap, which hides that from the function.
    (outside,) = torch.autograd.grad(vmap(special.mean)(LOC, SCALE, low, HIGH).sum(), low)
    torch.testing.assert_close(outside, together, rtol=1e-11, atol=0)


@EACH
def test_of_no_elements(name):
    none = [x[:0].clone().requires_grad_() for x in (LOC, SCALE, LOW, HIGH)]
    function = {
        "log_density": lambda *p: special.log_density(X[:0], *p),
        "cdf": lambda *p: special.cdf(X[:0], *p),
        "icdf": lambda *p: special.icdf(U[:0], *p),
        "kl_from": lambda *p: special.kl_to_truncated_normal(*p, *p),
        "kl_to": lambda *p: special.kl_to_truncated_normal(*p, *p),
    }.get(name, FUNCTIONS[name])
    value = function(*none)
    assert value.shape == (0,)
    assert all(g.shape == (0,) for g in torch.autograd.grad(value.sum(), none))
