"""What holds for any parameters, bounds, shapes and dtypes, tried by hypothesis."""

import math
import os

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.distributions import kl_divergence

from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform, TruncatedNormal

INF = math.inf
#: 100,000 were tried once; the suite tries fewer, the same ones every time.
NUM_CASES = int(os.environ.get("PYRO_SBP_PROPERTY_CASES", "150"))
CHECKED = settings(
    max_examples=NUM_CASES,
    deadline=None,
    derandomize="PYRO_SBP_PROPERTY_CASES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
DTYPES = st.sampled_from([torch.float32, torch.float64])
SHAPES = st.lists(st.integers(1, 3), max_size=2).map(tuple)
PROBABILITIES = st.floats(2.0**-24, 1 - 2.0**-24)


@st.composite
def parameters(draw, infinite=True):
    """(loc, scale, low, high) of one dtype: loc up to 1e5 scales outside, any width."""
    dtype = draw(DTYPES)
    width = math.exp(draw(st.floats(-4, 4)))
    low = draw(st.floats(-30, 30))
    high = low + width
    # The width of the interval in scales, and where loc is, in scales from an end or inside.
    scale = width * math.exp(draw(st.floats(-11, 8)))
    where = draw(st.sampled_from(["inside", "below", "above"]))
    if where == "inside":
        loc = low + width * draw(st.floats(0, 1))
    else:
        distance = scale * math.exp(draw(st.floats(-5, 11)))
        assume(distance < 1e4 * (1 + abs(low)))
        loc = low - distance if where == "below" else high + distance
    if infinite:
        side = draw(st.sampled_from(["none", "none", "low", "high", "both"]))
        low = -INF if side in ("low", "both") else low
        high = INF if side in ("high", "both") else high
    shape = draw(SHAPES)
    tensors = [torch.tensor(x, dtype=dtype) for x in (loc, scale, low, high)]
    assume(tensors[2] < tensors[3])
    return [tensors[0].expand(shape).contiguous(), *tensors[1:]]


def rounding(*tensors):
    return sum(torch.finfo(x.dtype).eps * x.double().abs() for x in tensors if x.isfinite().all())


@CHECKED
@given(p=parameters(), u=PROBABILITIES)
def test_truncated_normal(p, u):
    loc, scale, low, high = p
    loc, scale = loc.clone().requires_grad_(), scale.clone().requires_grad_()
    d = TruncatedNormal(loc, scale, low, high, validate_args=True)
    mean, stddev, entropy, x = d.mean, d.stddev, d.entropy(), d.icdf(torch.tensor(u))
    log_prob, cdf = d.log_prob(x.detach()), d.cdf(x.detach())
    results = {"mean": mean, "sd": stddev, "entropy": entropy, "icdf": x, "log_prob": log_prob}
    for name, value in (results | {"cdf": cdf, "variance": d.variance}).items():
        assert value.shape == loc.shape and value.dtype == loc.dtype, name
        assert value.isfinite().all(), name
    assert ((d.mode >= low) & (d.mode <= high)).all()
    assert ((mean >= low) & (mean <= high)).all()
    assert ((x >= low) & (x <= high)).all()
    assert (stddev > 0).all() and ((cdf >= 0) & (cdf <= 1)).all()
    # No distribution on an interval has more variance than the ends with half of the mass each,
    # none with a log-concave density more than the normal that was cut, and none of that variance
    # more entropy than the normal of it.
    slack = 1 + 4 * torch.finfo(loc.dtype).eps
    assert (stddev <= slack * (high - low) / 2).all()
    assert (stddev <= slack * scale).all()
    bound = stddev.log() + 0.5 * math.log(2 * math.pi * math.e)
    assert (entropy <= bound + 1e-5 * bound.abs().clamp_min(1)).all()
    # The density is highest at the mode.
    assert (d.log_prob(d.mode) >= log_prob - 1e-5 * log_prob.abs().clamp_min(1)).all()
    # Gradients: finite, and a quantile moves with loc by a share of its step.
    for name, value in results.items():
        grads = torch.autograd.grad(value.sum(), (loc, scale), allow_unused=True, retain_graph=True)
        assert all(g is None or g.isfinite().all() for g in grads), name
    (d_loc,) = torch.autograd.grad(x.sum(), loc, retain_graph=True)
    assert ((d_loc >= -1e-6) & (d_loc <= 1 + 1e-6)).all()
    (d_mean,) = torch.autograd.grad(mean.sum(), loc)
    torch.testing.assert_close(d_mean, (stddev / scale).square().detach(), rtol=1e-5, atol=0)


@CHECKED
@given(p=parameters(), u=st.lists(PROBABILITIES, min_size=2, max_size=2))
def test_cdf_and_icdf_in_float64(p, u):
    # In float64, so that the rounding of x between the two stays small.
    d = TruncatedNormal(*(x.double() for x in p))
    below, above = sorted(u)
    x = d.icdf(torch.tensor(below, dtype=torch.float64))
    y = d.icdf(torch.tensor(above, dtype=torch.float64))
    assert (x <= y).all()
    assert (d.cdf(x) <= d.cdf(y) + 1e-15).all()
    # x is rounded to eps |x|, the end and loc included, which the density turns into probability.
    end = torch.minimum((d.low - d.loc).abs(), (d.high - d.loc).abs())
    size = x.abs() + torch.where(end.isfinite(), end, 0) + d.loc.abs()
    tolerance = 1e-12 + 4 * torch.finfo(torch.float64).eps * size * d.log_prob(x).exp()
    assert ((d.cdf(x) - below).abs() <= tolerance).all()
    # Where the mirror is exact, so are its values: -x has the bounds and loc negated.
    mirrored = TruncatedNormal(-d.loc, d.scale, -d.high, -d.low)
    # (A mean is right to its standard deviation, since it may be zero.)
    size = torch.maximum(d.mean.abs(), d.stddev)
    assert ((mirrored.mean + d.mean).abs() <= 1e-13 * size).all()
    torch.testing.assert_close(mirrored.variance, d.variance, rtol=1e-11, atol=0)
    torch.testing.assert_close(mirrored.entropy(), d.entropy(), rtol=1e-12, atol=1e-12)


@CHECKED
@given(p=parameters(infinite=False), u=PROBABILITIES)
def test_log_distributions(p, u):
    loc, scale, low, high = p
    loc, scale = loc.clone().requires_grad_(), scale.clone().requires_grad_()
    q = TruncatedLogNormal(loc, scale, low, high, validate_args=True)
    prior = TruncatedLogUniform(low, high, validate_args=True).expand(loc.shape)
    x = q.rsample((3,))
    assert x.shape == (3, *loc.shape) and x.dtype == loc.dtype
    assert q.log_prob(x).isfinite().all() and prior.log_prob(x).isfinite().all()
    assert q.support.check(q.mean).all() and q.support.check(q.mode).all()
    kl = kl_divergence(q, prior)
    assert (kl >= 0).all()
    results = {"kl": kl, "snr": q.snr, "mean": q.mean, "sample": x, "icdf": q.icdf(torch.tensor(u))}
    for name, value in results.items():
        assert value.isfinite().all(), name
        grads = torch.autograd.grad(value.sum(), (loc, scale), retain_graph=True)
        assert all(g.isfinite().all() for g in grads), name
    assert (q.snr > 0).all()
    # Bhatia and Davis: Var <= (max - E)(E - min), and E >= min.
    ends = q.support.lower_bound.double(), q.support.upper_bound.double()
    mean = q.mean.double()
    most = (ends[1] - mean) * (mean - ends[0])
    tolerance = 8 * torch.finfo(loc.dtype).eps * mean * ends[1]
    assert (q.stddev.double().square() <= most + tolerance).all()
    # Of the same entropies: KL = log(width) - H of log theta.
    base = TruncatedNormal(loc.double(), scale.double(), low.double(), high.double())
    entropy = (high.double() - low.double()).log() - base.entropy()
    assert ((kl - entropy).abs() <= 1e-6 * kl.double().clamp_min(1)).all()


@CHECKED
@given(p=parameters(infinite=False), q=parameters(infinite=False))
def test_kl_between_truncated_normals(p, q):
    # On the bounds of the first; never negative, and nothing where both are the same.
    loc, scale, low, high = (x.double() for x in p)
    first = TruncatedNormal(loc, scale, low, high)
    same = kl_divergence(first, TruncatedNormal(loc, scale, low, high))
    assert (same <= 1e-12).all() and (same >= 0).all()
    width = high - low
    loc_q = low + width * torch.sigmoid(q[0].double().flatten()[0])
    other = TruncatedNormal(loc_q, scale * (0.5 + torch.sigmoid(q[1].double())), low, high)
    kl = kl_divergence(first, other)
    assert (kl >= 0).all() and kl.isfinite().all()
    # A wide normal is nearly the uniform.
    wide = kl_divergence(first, TruncatedNormal(loc_q, 1e4 * width, low, high))
    uniform = kl_divergence(first, torch.distributions.Uniform(low, high))
    torch.testing.assert_close(wide, uniform.expand_as(wide), rtol=1e-6, atol=1e-6)


# What the many cases found


def test_the_mean_of_a_symmetric_interval_is_zero_to_rounding():
    for end in (0.1, 3.0, 40.0, INF):
        d = TruncatedNormal(torch.tensor(0.0, dtype=torch.float64), 1.0, -end, end)
        assert d.mean.abs() < 1e-15


def test_the_cdf_of_a_narrow_interval_is_nearly_linear():
    # 3e-4 scales wide: the two tails agree to eleven digits, and their difference must not be used.
    d = TruncatedNormal(torch.tensor(0.5, dtype=torch.float64), 2980.958, 0.0, 1.0)
    x = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    # F(x) - x is x (1 - x) (x - 1/2) / (6 scale^2) for a normal about the middle, to first order.
    true = x + x * (1 - x) * (2 * x - 1) / (12 * 2980.958**2)
    torch.testing.assert_close(d.cdf(x), true, rtol=0, atol=1e-15)
