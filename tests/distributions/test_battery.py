"""The battery that Pyro's own distributions pass, over these: scipy is the other opinion."""

import copy
import io
import math
import pickle
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.distributions import biject_to, kl_divergence
from torch.distributions.transforms import ExpTransform

from pyro_sbp.distributions import (
    AdditiveNormal,
    TruncatedLogNormal,
    TruncatedLogUniform,
    TruncatedNormal,
)

INF = math.inf


def entropy(x: Any) -> float:
    """By quadrature: scipy's truncnorm.entropy is NaN where a bound is infinite."""
    return x.expect(lambda v: -x.logpdf(v))


class LogTwin:
    """theta = exp(x) for x of a scipy distribution."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def logpdf(self, theta):
        return self.x.logpdf(np.log(theta)) - np.log(theta)

    def cdf(self, theta):
        return self.x.cdf(np.log(theta))

    def ppf(self, u):
        return np.exp(self.x.ppf(u))

    def mean(self):
        return self.x.expect(np.exp)

    def var(self):
        mean = self.mean()
        return self.x.expect(lambda x: (np.exp(x) - mean) ** 2)

    def entropy(self):
        return entropy(self.x) + self.x.mean()


def truncnorm(loc, scale, low, high):
    return stats.truncnorm((low - loc) / scale, (high - loc) / scale, loc, scale)


class Fixture(NamedTuple):
    """A class, its scipy twin, and settings that scipy is right at."""

    cls: type
    twin: Any
    examples: list[dict[str, float]]


FIXTURES = [
    Fixture(
        TruncatedNormal,
        truncnorm,
        [
            {"loc": 0.0, "scale": 1.0, "low": -1.0, "high": 2.0},
            {"loc": -3.0, "scale": 0.5, "low": -20.0, "high": 0.0},
            {"loc": 2.0, "scale": 1.5, "low": -5.0, "high": 0.0},
            {"loc": -9.0, "scale": 30.0, "low": -20.0, "high": 0.0},
            {"loc": 1.0, "scale": 2.0, "low": 0.0, "high": INF},
            {"loc": 1.0, "scale": 2.0, "low": -INF, "high": 0.5},
            {"loc": 1.0, "scale": 2.0, "low": -INF, "high": INF},
        ],
    ),
    Fixture(
        TruncatedLogNormal,
        lambda loc, scale, log_low=-20.0, log_high=0.0: LogTwin(
            truncnorm(loc, scale, log_low, log_high)
        ),
        [
            {"loc": -1.0, "scale": 0.5},
            {"loc": 0.5, "scale": 0.3},
            {"loc": -5.0, "scale": 2.0, "log_low": -7.0, "log_high": -3.0},
            {"loc": -1.0, "scale": 1.0, "log_low": -2.0, "log_high": 2.0},
        ],
    ),
    Fixture(
        AdditiveNormal,
        lambda loc, log_variance: stats.norm(loc, math.exp(log_variance / 2)),
        [{"loc": 0.5, "log_variance": -3.0}, {"loc": -2.0, "log_variance": 2.5}],
    ),
    Fixture(
        TruncatedLogUniform,
        lambda log_low=-20.0, log_high=0.0: stats.loguniform(math.exp(log_low), math.exp(log_high)),
        [
            {"log_low": -20.0, "log_high": 0.0},
            {"log_low": -5.0, "log_high": 1.0},
            {"log_low": -0.2, "log_high": 0.1},
        ],
    ),
]
CASES = [(f, example) for f in FIXTURES for example in f.examples]
EACH_CASE = pytest.mark.parametrize(
    "fixture, example", CASES, ids=[f"{f.cls.__name__}-{i}" for i, (f, _) in enumerate(CASES)]
)
EACH_CLASS = pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f.cls.__name__)
U = torch.tensor([1e-6, 0.01, 0.25, 0.5, 0.75, 0.99, 1 - 1e-6], dtype=torch.float64)


def make(fixture, example, dtype=torch.float64):
    return fixture.cls(**{k: torch.tensor(v, dtype=dtype) for k, v in example.items()})


def batch(fixture, dtype=torch.float64):
    """A distribution of batch shape [2, 1] from two examples, with every parameter given."""
    first, second = (fixture.cls(**e) for e in fixture.examples[:2])
    names = fixture.cls.arg_constraints
    return {
        k: torch.stack([getattr(first, k), getattr(second, k)]).to(dtype).reshape(2, 1)
        for k in names
    }


@EACH_CASE
def test_agrees_with_scipy(fixture, example):
    d, twin = make(fixture, example), fixture.twin(**example)
    x = twin.ppf(U.numpy())
    value = torch.from_numpy(x)
    value = torch.clamp(value, min=getattr(d.support, "lower_bound", -INF))
    value = torch.clamp(value, max=getattr(d.support, "upper_bound", INF))
    np.testing.assert_allclose(d.icdf(U), x, rtol=1e-9)
    np.testing.assert_allclose(d.cdf(value), U, rtol=1e-8)
    np.testing.assert_allclose(d.log_prob(value), twin.logpdf(value.numpy()), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(d.mean, twin.mean(), rtol=1e-7)
    np.testing.assert_allclose(d.variance, twin.var(), rtol=1e-7)
    true = entropy(twin) if fixture.cls is TruncatedNormal else twin.entropy()
    np.testing.assert_allclose(d.entropy(), true, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(d.stddev, math.sqrt(twin.var()), rtol=1e-7)
    ratio = twin.mean() / math.sqrt(twin.var())
    # A weight of either sign carries signal.
    ratio = abs(ratio) if fixture.cls is AdditiveNormal else ratio
    np.testing.assert_allclose(d.snr, ratio, rtol=1e-7)


@EACH_CASE
def test_mode_is_where_the_density_is_largest(fixture, example):
    d = make(fixture, example)
    grid = d.icdf(torch.linspace(0.001, 0.999, 2001, dtype=torch.float64))
    assert d.log_prob(d.mode) >= d.log_prob(grid).max() - 1e-12


@EACH_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_goodness_of_fit(fixture, example, dtype):
    # Kolmogorov-Smirnov at the level 1e-3, over 28 tests, seeds fixed.
    d, twin = make(fixture, example, dtype), fixture.twin(**example)
    torch.manual_seed(0)
    samples = d.sample((20_000,))
    assert samples.dtype == dtype
    assert d.support.check(samples).all()
    assert d.log_prob(samples).isfinite().all()
    assert stats.kstest(samples.double().numpy(), twin.cdf).pvalue > 1e-3


@EACH_CASE
def test_density_integrates_to_the_cdf(fixture, example):
    d = make(fixture, example)
    x = d.icdf(torch.linspace(0.05, 0.95, 4001, dtype=torch.float64))
    mass = torch.trapezoid(d.log_prob(x).exp(), x)
    assert mass.item() == pytest.approx(0.9, rel=1e-5)


@EACH_CASE
def test_icdf_and_cdf_are_inverse(fixture, example):
    d = make(fixture, example)
    torch.testing.assert_close(d.cdf(d.icdf(U)), U, rtol=1e-9, atol=1e-12)


@EACH_CASE
def test_support_has_a_bijection_from_the_reals(fixture, example):
    d = make(fixture, example)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    y = biject_to(d.support)(x)
    assert d.support.check(y).all()
    torch.testing.assert_close(biject_to(d.support).inv(y), x, rtol=1e-4, atol=1e-4)
    assert fixture.cls.support.event_dim == 0 and not fixture.cls.support.is_discrete


@EACH_CASE
def test_outside_of_the_support(fixture, example):
    d = fixture.cls(**{k: torch.tensor(v) for k, v in example.items()}, validate_args=True)
    outside = [x for x in (-25.0, 0.0, 25.0) if not d.support.check(torch.tensor(x))]
    for x in map(torch.tensor, outside):
        with pytest.raises(ValueError, match="within the support"):
            d.log_prob(x)
        d._validate_args = False
        assert d.log_prob(x) == -INF
        assert d.cdf(x) == (1.0 if x > d.icdf(torch.tensor(0.5)) else 0.0)
        d._validate_args = True


@EACH_CLASS
@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (4, 2, 3), (5, 4, 2, 1)])
@pytest.mark.parametrize("sample_shape", [(), (3,), (1, 2)])
def test_expand(fixture, shape, sample_shape):
    d = fixture.cls(**batch(fixture))
    e = d.expand(shape)
    assert type(e) is fixture.cls
    assert e.batch_shape == torch.Size(shape) and e.event_shape == ()
    torch.manual_seed(0)
    x = e.rsample(sample_shape)
    assert x.shape == sample_shape + shape == e.shape(torch.Size(sample_shape))
    assert e.log_prob(x).shape == x.shape
    torch.testing.assert_close(e.log_prob(x), d.log_prob(x))
    torch.testing.assert_close(e.cdf(x), d.cdf(x))
    for name in ("mean", "variance", "stddev", "mode", "snr", *fixture.cls.arg_constraints):
        value = getattr(e, name)
        assert value.shape == torch.Size(shape)
        torch.testing.assert_close(value, getattr(d, name).expand(shape))
    assert e.entropy().shape == torch.Size(shape)
    assert e.expand((7, *shape)).batch_shape == (7, *shape)
    assert e.expand_by([6]).batch_shape == (6, *shape)
    event = e.to_event(2)
    assert event.event_shape == torch.Size(shape[-2:])
    assert event.log_prob(x).shape == sample_shape + shape[:-2]
    assert e.mask(torch.zeros(shape, dtype=torch.bool)).log_prob(x).eq(0).all()
    # The draws of the copies are independent.
    assert x.unique().numel() == x.numel()


@EACH_CLASS
def test_expand_keeps_validation_and_refuses_what_does_not_fit(fixture):
    d = fixture.cls(**batch(fixture), validate_args=False)
    assert d.expand([2, 3])._validate_args is False
    with pytest.raises(ValueError, match=r"\(2, 1\) does not expand to \(3,\)"):
        d.expand([3])
    with pytest.raises(ValueError, match=r"\(2, 1\) does not expand to \(3, 3\)"):
        d.expand([3, 3])


@EACH_CLASS
def test_values_that_do_not_broadcast_are_refused(fixture):
    d = fixture.cls(**batch(fixture)).expand([2, 3])
    value = d.sample()
    for wrong in (value[:, :2], value.expand(3, 2, 3).transpose(0, 1)[..., :2]):
        with pytest.raises((ValueError, RuntimeError)):
            d.log_prob(wrong)
    # Of the first row alone, values may be out of the support of the second.
    assert d.log_prob(value[:, :1]).shape == (2, 3) and d.log_prob(value[None]).shape == (1, 2, 3)


@EACH_CLASS
def test_infer_shapes(fixture):
    arguments = batch(fixture)
    first = next(iter(arguments))
    arguments[first] = arguments[first].expand(3, 2, 1)
    shapes = {k: v.shape for k, v in arguments.items()}
    d = fixture.cls(**arguments)
    assert fixture.cls.infer_shapes(**shapes) == (d.batch_shape, d.event_shape)
    assert d.batch_shape == (3, 2, 1)


@EACH_CLASS
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "save"])
def test_copies(fixture, how):
    d = fixture.cls(**batch(fixture)).expand([2, 3])
    if how == "pickle":
        new = pickle.loads(pickle.dumps(d))
    elif how == "deepcopy":
        new = copy.deepcopy(d)
    else:
        buffer = io.BytesIO()
        torch.save(d, buffer)
        parts = [fixture.cls, TruncatedNormal, dist.Uniform, ExpTransform]
        with torch.serialization.safe_globals(parts):
            new = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert type(new) is fixture.cls and new.batch_shape == (2, 3)
    torch.testing.assert_close(new.mean, d.mean, rtol=0, atol=0)
    torch.manual_seed(0)
    x = new.sample()
    torch.manual_seed(0)
    torch.testing.assert_close(d.sample(), x, rtol=0, atol=0)


@EACH_CLASS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_parameters(fixture, dtype):
    d = fixture.cls(**batch(fixture, dtype))
    exact = fixture.cls(**{k: v.double() for k, v in batch(fixture, dtype).items()})
    x = d.rsample((100,))
    assert d.support.check(x).all()
    results = {name: getattr(d, name) for name in ("mean", "variance", "stddev", "mode", "snr")}
    results |= {"entropy": d.entropy(), "log_prob": d.log_prob(x), "cdf": d.cdf(x), "sample": x}
    results["icdf"] = d.icdf(torch.tensor(0.5))
    assert {name: value.dtype for name, value in results.items()} == dict.fromkeys(results, dtype)
    # Each result is the float64 one, rounded once: subnormal numbers of float16 aside.
    for name in ("mean", "stddev", "snr"):
        torch.testing.assert_close(
            results[name].double(),
            getattr(exact, name),
            rtol=torch.finfo(dtype).eps,
            atol=torch.finfo(dtype).tiny * torch.finfo(dtype).eps,
        )


@EACH_CLASS
def test_repr_shows_the_parameters(fixture):
    names = fixture.cls.arg_constraints
    shapes = ", ".join(f"{name}: torch.Size([2, 1])" for name in names)
    assert repr(fixture.cls(**batch(fixture))) == f"{fixture.cls.__name__}({shapes})"
    example = fixture.examples[0]
    values = ", ".join(f"{k}: {example[k]}" for k in names if k in example)
    assert repr(fixture.cls(**example)).startswith(f"{fixture.cls.__name__}({values}")


@EACH_CLASS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_no_elements(fixture, dtype):
    names = fixture.cls.arg_constraints
    empty = {k: v[:0].to(dtype, copy=True).requires_grad_() for k, v in batch(fixture).items()}
    d = fixture.cls(**empty)
    value = torch.zeros((0, 1), dtype=dtype)
    results = [getattr(d, x) for x in ("mean", "variance", "stddev", "mode", "snr", *names)]
    results += [d.log_prob(value), d.cdf(value), d.icdf(value), d.rsample(), d.entropy()]
    results += [d.expand([3, 0, 1]).rsample().sum(0), kl_divergence(d, fixture.cls(**empty))]
    one = fixture.cls(**batch(fixture)).mean[:1].to(dtype)  # a value that broadcasts
    results += [d.rsample([3]).sum(0), d.log_prob(one), d.cdf(one)]
    for result in results:
        assert result.shape == (0, 1)
        grads = torch.autograd.grad(result.sum(), list(empty.values()), allow_unused=True)
        assert all(g is None or g.shape == (0, 1) for g in grads)


@EACH_CLASS
def test_numbers_and_tensors_mix(fixture):
    tensors = batch(fixture)
    first = next(iter(tensors))
    d = fixture.cls(**{k: v if k == first else v.flatten()[0].item() for k, v in tensors.items()})
    assert d.batch_shape == (2, 1) and d.mean.dtype == torch.float64
    assert fixture.cls(**{k: v.flatten()[0].item() for k, v in tensors.items()}).batch_shape == ()


@EACH_CLASS
def test_samples_carry_gradients_of_the_parameters_alone(fixture):
    assert fixture.cls.has_rsample or fixture.cls(**batch(fixture)).has_rsample
    tensors = batch(fixture)
    for name in ("loc", "scale"):
        if name in tensors:
            tensors[name].requires_grad_()
    d = fixture.cls(**tensors)
    assert not d.sample().requires_grad
    assert d.rsample().requires_grad == ("loc" in tensors)


@EACH_CLASS
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(fixture):
    tensors = {k: v.float().cuda() for k, v in batch(fixture).items()}
    d, cpu = fixture.cls(**tensors), fixture.cls(**{k: v.cpu() for k, v in tensors.items()})
    x = d.rsample((1000,))
    assert x.is_cuda and d.support.check(x).all()
    torch.testing.assert_close(d.log_prob(x).cpu(), cpu.log_prob(x.cpu()))
    torch.testing.assert_close(d.mean.cpu(), cpu.mean)
    torch.testing.assert_close(d.snr.cpu(), cpu.snr)


def test_a_uniform_is_the_limit_of_a_wide_normal():
    wide = TruncatedLogNormal(torch.tensor(-10.0, dtype=torch.float64), 1e5)
    flat = TruncatedLogUniform(torch.tensor(-20.0, dtype=torch.float64), 0.0)
    for name in ("mean", "variance", "snr"):
        torch.testing.assert_close(getattr(wide, name), getattr(flat, name), rtol=1e-8, atol=0)
    assert flat.snr.item() == pytest.approx(1 / 3, rel=2e-1)
    torch.testing.assert_close(wide.icdf(U), flat.icdf(U), rtol=1e-6, atol=0)


def test_an_untruncated_normal_is_the_normal():
    d, normal = TruncatedNormal(0.3, 2.0, -INF, INF), dist.Normal(0.3, 2.0)
    x = torch.linspace(-9, 9, 7)
    torch.testing.assert_close(d.log_prob(x), normal.log_prob(x))
    torch.testing.assert_close(d.cdf(x), normal.cdf(x))
    torch.testing.assert_close(d.entropy(), normal.entropy())
    torch.testing.assert_close(d.variance, normal.variance)
