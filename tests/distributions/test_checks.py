"""Bad input: one clear line each, under validation."""

import math

import pyro
import pytest
import torch

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform, TruncatedNormal

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def validation():
    # torch.compile, in another test, turns it off for the whole process.
    with pyro.validation_enabled(True):
        yield


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF, [1.0, -2.0, 1.0]])
@pytest.mark.parametrize("cls", [TruncatedNormal, TruncatedLogNormal])
def test_scale(cls, scale):
    bad = next(x for x in (scale if isinstance(scale, list) else [scale]) if not 0 < x < INF)
    message = rf"^{cls.__name__}: scale must be positive and finite, got {bad:g}$"
    with pytest.raises(ValueError, match=message):
        cls(torch.zeros(3), torch.tensor(scale), -1.0, 0.0)


@pytest.mark.parametrize("loc", [NAN, INF, -INF])
@pytest.mark.parametrize("cls", [TruncatedNormal, TruncatedLogNormal])
def test_loc(cls, loc):
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: loc must be finite, got {loc:g}$"):
        cls(loc, 1.0, -1.0, 0.0)


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (2.0, 1.0), (NAN, 1.0), (0.0, NAN)])
def test_bounds(low, high):
    with pytest.raises(ValueError, match=rf"^TruncatedNormal: low must be below high, got {low:g}"):
        TruncatedNormal(0.0, 1.0, low, high)
    for make in (TruncatedLogUniform, lambda a, b: TruncatedLogNormal(0.0, 1.0, a, b)):
        with pytest.raises(ValueError, match=r"log_(low|high) must be .*, got (1|2|nan)$"):
            make(low, high)


@pytest.mark.parametrize(
    "dtype, message, low, high",
    [
        (torch.float64, r"\[-350, 350\], so that float64 can represent its exp", -400.0, 0.0),
        (torch.float64, r"\[-350, 350\], so that float64 can represent its exp", 0.0, 400.0),
        (torch.float32, r"\[-87\.34, 88\.72\], so that float32 can represent", -100.0, 0.0),
        (torch.float32, r"\[-87\.34, 88\.72\], so that float32 can represent", 0.0, 100.0),
        (torch.float32, r"\[-87\.34, 88\.72\], so that float32 can represent", -INF, 0.0),
        (torch.float32, r"\[-87\.34, 88\.72\], so that float32 can represent", 0.0, INF),
        (torch.float16, r"\[-87\.34, 11\.09\], so that float16 can represent", 0.0, 12.0),
    ],
)
def test_log_bounds_whose_exponential_leaves_the_range(dtype, message, low, high):
    low, high = torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype)
    for make in (TruncatedLogUniform, lambda a, b: TruncatedLogNormal(0.0, 1.0, a, b)):
        with pytest.raises(ValueError, match=rf"log_(low|high) must be within {message}.*, got"):
            make(low, high)


def test_without_validation_what_the_dtype_cannot_represent_is_rounded():
    for d in (
        TruncatedLogUniform(-200.0, 200.0, validate_args=False),
        TruncatedLogNormal(0.0, 90.0, -200.0, 200.0, validate_args=False),
    ):
        u = torch.tensor([0.01, 0.5, 0.99])
        torch.testing.assert_close(d.icdf(u), torch.tensor([0.0, 1.0, INF]), rtol=1e-4, atol=0)
        assert not d.sample((1000,)).isnan().any()


@pytest.mark.parametrize("validate_args", [True, False])
def test_shapes(validate_args):
    message = r"shapes do not broadcast: loc \(3,\), scale \(2,\), "
    for cls in (TruncatedNormal, TruncatedLogNormal):
        with pytest.raises(ValueError, match=message):
            cls(torch.zeros(3), torch.ones(2), -1.0, 0.0, validate_args=validate_args)
    with pytest.raises(ValueError, match=r"log_low \(3,\), log_high \(2,\)$"):
        TruncatedLogUniform(torch.zeros(3), torch.ones(2), validate_args=validate_args)


def test_what_is_not_a_number():
    with pytest.raises(ValueError, match="scale must be a tensor or a number, got 'wide'"):
        TruncatedNormal(0.0, "wide", -1.0, 0.0)


DISTRIBUTIONS = [
    (TruncatedNormal(torch.zeros(3), 1.0, -1.0, 2.0), [-1.1, 2.1, NAN, INF]),
    (TruncatedLogNormal(torch.zeros(3), 1.0), [0.0, -1.0, 1.1, 1e-9, NAN]),
    (TruncatedLogUniform(torch.full((3,), -20.0), 0.0), [0.0, -1.0, 1.1, 1e-9, NAN]),
]


@pytest.mark.parametrize("d, values", DISTRIBUTIONS, ids=lambda x: type(x).__name__)
def test_values(d, values):
    name = type(d).__name__
    for value in values:
        message = rf"^{name}: the value must be within the support, got {value:g}$"
        for method in (d.log_prob, d.cdf):
            with pytest.raises(ValueError, match=message):
                method(torch.tensor([0.5, value, 0.5]))
    with pytest.raises(ValueError, match=r"\(2,\) does not broadcast against the batch shape \(3,"):
        d.log_prob(torch.full((2,), 0.5))
    with pytest.raises(ValueError, match=r"the value must be a tensor, got 0\.5"):
        d.log_prob(0.5)
    for p in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=rf"^{name}: a probability must be within .*, got"):
            d.icdf(torch.tensor(p))


@pytest.mark.parametrize("d", [d for d, _ in DISTRIBUTIONS], ids=lambda x: type(x).__name__)
def test_nan_gives_nan_without_validation(d):
    d = type(d)(**{k: getattr(d, k) for k in d.arg_constraints}, validate_args=False)
    value = torch.tensor([0.5, NAN, 0.5], requires_grad=True)
    for method in (d.log_prob, d.cdf, d.icdf):
        result = method(value)
        assert result.isnan().tolist() == [False, True, False]
        assert result.isfinite().tolist() == [True, False, True]


def test_validation_follows_pyro():
    with pyro.validation_enabled(False):
        assert TruncatedLogNormal(0.0, -1.0).scale == -1
        TruncatedLogNormal(0.0, 1.0).log_prob(torch.tensor(2.0))
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="scale must be"):
        TruncatedLogNormal(0.0, -1.0)
    assert TruncatedLogNormal(0.0, -1.0, validate_args=False).scale == -1
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="scale must be"):
        TruncatedLogNormal(0.0, -1.0, validate_args=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_at_the_ends_are_valid(dtype):
    # Most of the mass is within a rounding of the ends, so that exp and log cannot agree.
    loc = torch.tensor([-20.0, 0.0, 5.0, -25.0], dtype=dtype)
    for log_low, log_high in ((-20.0, 0.0), (-7.3, -0.1), (-1 / 3, 1e-3)):
        d = TruncatedLogNormal(loc, math.exp(-10), log_low, log_high, validate_args=True)
        prior = TruncatedLogUniform(torch.tensor(log_low, dtype=dtype), log_high)
        x = d.rsample((10_000,))
        assert d.log_prob(x).isfinite().all() and d.cdf(x).isfinite().all()
        assert prior.log_prob(x).isfinite().all()
        ends = torch.stack([d.support.lower_bound, d.support.upper_bound])
        assert d.log_prob(ends).isfinite().all() and prior.log_prob(ends).isfinite().all()
        tolerance = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 0}
        torch.testing.assert_close(d.icdf(torch.zeros(4)), d.support.lower_bound, **tolerance)
        torch.testing.assert_close(d.icdf(torch.ones(4)), d.support.upper_bound, **tolerance)
