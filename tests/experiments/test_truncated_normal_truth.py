"""The reference in 110 digits agrees with numerical integration and differentiation by mpmath."""

import pytest
from mpmath import mp, mpf

from pyro_sbp.experiments.truncated_normal_truth import DIGITS, Truth

STEP = mpf("1e-30")
SETTINGS = [(-3.0, 0.5, -20.0, 0.0), (-22.0, 0.3, -20.0, 0.0), (-9.0, 90.0, -20.0, 0.0)]


@pytest.mark.parametrize("loc, scale, low, high", SETTINGS)
def test_moments_are_integrals(loc, scale, low, high):
    t = Truth(loc, scale, low, high)
    mp.dps = 30
    edges = [low, *(x for k in range(-9, 10, 3) if low < (x := loc + k * scale) < high), high]
    if loc < low:  # the mass is within a few scale^2 / distance of the end
        edges = [low, low + 0.1, low + 0.3, low + 1, low + 5, high]

    def integral(f):
        return mp.quad(lambda x: f(x) * mp.exp(t.log_density(x)), edges)

    assert abs(integral(lambda x: 1) - 1) < 1e-12
    assert abs(integral(lambda x: x) / t.mean - 1) < 1e-12
    assert abs(integral(lambda x: (x - t.mean) ** 2) / t.variance - 1) < 1e-12
    assert abs(integral(mp.exp) / t.exp_mean - 1) < 1e-12
    assert abs(integral(lambda x: (mp.exp(x) - t.exp_mean) ** 2) / t.exp_variance - 1) < 1e-12
    kl = integral(lambda x: t.log_density(x) + mp.log(mpf(high) - low))
    assert abs(kl / t.kl - 1) < 1e-10


@pytest.mark.parametrize("loc, scale, low, high", SETTINGS)
def test_derivatives_are_differences(loc, scale, low, high):
    t = Truth(loc, scale, low, high)

    def in_loc(f):
        return mp.diff(lambda x: f(Truth(x, scale, low, high)), loc, h=STEP)

    def in_log_scale(f):
        return mp.diff(lambda x: f(Truth(loc, mpf(scale) * mp.exp(x), low, high)), 0, h=STEP)

    def relative(difference, name):
        return abs(
            difference(lambda s: getattr(s, name.partition("_d_")[0])) / getattr(t, name) - 1
        )

    for name in ("kl_d_loc", "mean_d_loc", "exp_mean_d_loc"):
        assert relative(in_loc, name) < 1e-20
    for name in ("kl_d_log_scale", "exp_mean_d_log_scale"):
        assert relative(in_log_scale, name) < 1e-20
    x = t.icdf(0.3, t.mean)
    assert abs(t.cdf(x) - 0.3) < 1e-38
    assert abs(in_loc(lambda s: s.icdf(0.3, x)) / t.sample_d_loc(0.3, x) - 1) < 1e-15
    d_log_scale = t.sample_d_log_scale(0.3, x)
    assert abs(in_log_scale(lambda s: s.icdf(0.3, x)) / d_log_scale - 1) < 1e-15


def test_cancellation_leaves_thirty_digits():
    # The worst corner: 1.1e5 scales outside. More digits change nothing before the thirtieth.
    mp.dps = DIGITS
    scale = mp.exp(-10)

    def corner(digits, monkeypatch):
        monkeypatch.setattr("pyro_sbp.experiments.truncated_normal_truth.DIGITS", digits)
        t = Truth(5.0, scale, -20.0, 0.0)
        return t.kl, t.kl_d_loc, t.kl_d_log_scale, t.exp_variance, t.exp_mean_d_log_scale

    with pytest.MonkeyPatch.context() as monkeypatch:
        few, many = corner(DIGITS, monkeypatch), corner(2 * DIGITS, monkeypatch)
    mp.dps = DIGITS
    assert all(abs(a / b - 1) < mpf(10) ** -30 for a, b in zip(few, many, strict=True))
