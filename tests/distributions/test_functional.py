"""torch.compile and torch.func on the distributions themselves."""

import os

import pyro
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform, TruncatedNormal

LOC = torch.tensor([-24.0, -12.0, -3.0, -0.1, 0.5, 4.0])
LOG_SCALE = torch.tensor([-1.0, 2.0, 0.0, -5.0, -2.0, -7.0])
U = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.7, 0.01])
BOUNDS = torch.tensor(-20.0), torch.tensor(0.0)


def posterior(loc, log_scale):
    return TruncatedLogNormal(loc, log_scale.exp(), *BOUNDS, validate_args=False)


def kl(loc, log_scale):
    prior = TruncatedLogUniform(*BOUNDS, validate_args=False).expand(loc.shape)
    return kl_divergence(posterior(loc, log_scale), prior)


FUNCTIONS = {
    "kl": kl,
    "mean": lambda *p: posterior(*p).mean,
    "snr": lambda *p: posterior(*p).snr,
    "sample_at_u": lambda *p: posterior(*p).icdf(U),
    "log_prob": lambda *p: posterior(*p).log_prob(U),
    "kl_to_normal": lambda loc, log_scale: kl_divergence(
        TruncatedNormal(loc, log_scale.exp(), *BOUNDS, validate_args=False),
        torch.distributions.Normal(loc.detach() + 1, 2.0, validate_args=False),
    ),
}


#: Compiling takes seconds for each function.
SOME = [
    pytest.param(name, marks=[] if name in ("kl", "sample_at_u") else pytest.mark.slow)
    for name in FUNCTIONS
]


@pytest.mark.parametrize("name", SOME)
def test_compile_without_breaks_gives_the_same(name):
    # With PYRO_SBP_INDUCTOR=1 through the code generator too, half a minute for each.
    backend = "inductor" if os.environ.get("PYRO_SBP_INDUCTOR") else "aot_eager"
    results = []
    for f in (FUNCTIONS[name], torch.compile(FUNCTIONS[name], fullgraph=True, backend=backend)):
        loc, log_scale = LOC.clone().requires_grad_(), LOG_SCALE.clone().requires_grad_()
        value = f(loc, log_scale)
        results.append((value, *torch.autograd.grad(value.sum(), (loc, log_scale))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SOME)
def test_compile_without_gradients(name):
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(LOC, LOG_SCALE), FUNCTIONS[name](LOC, LOG_SCALE))
    with torch.no_grad():
        value = compiled(LOC.clone().requires_grad_(), LOG_SCALE)
    torch.testing.assert_close(value, FUNCTIONS[name](LOC, LOG_SCALE))


def test_compile_with_gradients_in_the_bounds():
    def function(low, high):
        return TruncatedNormal(LOC, 1.0, low, high, validate_args=False).mean

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        bounds = [x.clone().requires_grad_() for x in BOUNDS]
        results.append(torch.autograd.grad(f(*bounds).sum(), bounds))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cls", [TruncatedNormal, TruncatedLogNormal])
def test_vmap_under_validation(cls):
    loc = torch.tensor([-1.0, -2.0, -0.5])
    value, both = torch.tensor(0.7), {"validate_args": True}
    with pyro.validation_enabled(True):
        found = torch.func.vmap(lambda x: cls(x, 1.0, -1.0, 1.0).log_prob(value))(loc)
        torch.testing.assert_close(found, cls(loc, 1.0, -1.0, 1.0).log_prob(value))
        for wrong in (
            lambda x: cls(x, -x.abs(), -1.0, 1.0, **both),
            lambda x: cls(0.0, 1.0, x, -1.5, **both),
            lambda x: cls(x, 1.0, -1.0, 1.0, **both).log_prob(value - 5 * x),
        ):
            with pytest.raises(ValueError, match=r"must be .* in every element of vmap$"):
                torch.func.vmap(lambda x, wrong=wrong: [wrong(x), x][1])(loc)


@pytest.mark.parametrize("name", ["kl", "mean", "snr"])
def test_vmap_over_parameters_gives_the_same(name):
    torch.testing.assert_close(
        torch.func.vmap(FUNCTIONS[name])(LOC, LOG_SCALE), FUNCTIONS[name](LOC, LOG_SCALE)
    )


def test_vmap_of_sampling_draws_for_each():
    draw = torch.func.vmap(lambda *p: posterior(*p).rsample(), randomness="different")
    x = draw(LOC.expand(50, 6), LOG_SCALE.expand(50, 6))
    assert x.shape == (50, 6) and len(x[:, 2].unique()) == 50
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda *p: posterior(*p).rsample())(LOC, LOG_SCALE)
