"""The scores of units by model reduction, against mpmath and quadrature."""

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.distributions import TruncatedLogNormal
from pyro_sbp.models.gated_model import theta_prior
from pyro_sbp.pruning.choosing import choose_units
from pyro_sbp.pruning.criteria import SCORES, check_prior
from pyro_sbp.recipes.criteria import CRITERIA, find_criterion

LOW, HIGH = -20, 0
BMRS = ("bmrs-n", "bmrs-u")
#: Locations in the support, at its ends and outside, and log scales over the box of the guide.
LOCS = (-25.0, -20.0, -19.9, -10.0, -5.5, -0.5, 0.0, 5.0)
LOG_SCALES = (-10.0, -5.0, -2.0, 0.0, 2.0, 5.0)


def mass(loc, scale, low, high):
    """The probability of a normal variable between two numbers."""
    low, high = ((mpf(x) - mpf(loc)) / mpf(scale) for x in (low, high))
    if low > 0:  # in the lower tail, where the difference keeps its digits
        low, high = -high, -low
    return mpmath.ncdf(high) - mpmath.ncdf(low)


def evidence(criterion, loc, scale, prior_scale):
    """-dF, with the reduced prior of BMRS_N a point mass and that of BMRS_U on theta < 2^-8."""

    def of(loc, scale):
        total = mass(loc, scale, LOW, HIGH)
        if criterion == "bmrs-n":
            return mpmath.log(mpmath.npdf(LOW, mpf(loc), mpf(scale)) / total)
        return mpmath.log(mass(loc, scale, LOW, -8 * mpmath.log(2)) / total)

    if prior_scale is not None:
        return of(LOW, prior_scale) - of(loc, scale)
    uniform = mpf(1) / 20 if criterion == "bmrs-n" else (20 - 8 * mpmath.log(2)) / 20
    return mpmath.log(uniform) - of(loc, scale)


def score(criterion, loc, scale, prior_scale=None, dtype=torch.float64):
    loc, scale = (torch.as_tensor(x, dtype=dtype).reshape(-1) for x in (loc, scale))
    q = TruncatedLogNormal(loc, scale, LOW, HIGH)
    return SCORES[criterion](q, theta_prior(prior_scale, len(loc), loc))


@pytest.mark.parametrize("prior_scale", [None, 4.0])
@pytest.mark.parametrize("criterion", BMRS)
def test_the_score_is_that_of_mpmath_over_the_box_of_the_guide(criterion, prior_scale):
    grid = [(loc, log_scale) for loc in LOCS for log_scale in LOG_SCALES]
    loc, scale = (torch.tensor(x, dtype=torch.float64) for x in zip(*grid, strict=True))
    found = score(criterion, loc, scale.exp(), prior_scale)
    # Up to 1e11, quadratic in (20 + loc) / scale: no density of that size is a float.
    with mpmath.workdps(60):
        for (at, _), exact_scale, value in zip(grid, scale.exp().tolist(), found, strict=True):
            expected = evidence(criterion, at, exact_scale, prior_scale)
            # The prior is computed in float32, which the scales of priors are.
            tolerance = mpf("1e-6") + mpf("1e-9") * abs(expected)
            assert abs(mpf(float(value)) - expected) <= tolerance, (at, exact_scale)


@pytest.mark.parametrize("criterion", BMRS)
def test_float32_is_enough_where_units_are_decided_on(criterion):
    loc, scale = torch.tensor([-19.0, -12.0, -6.0, -3.0]), torch.tensor([0.3, 2.0, 4.0, 3.0])
    single, double = score(criterion, loc, scale, dtype=torch.float32), score(criterion, loc, scale)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_a_narrow_spike_has_the_limit_as_its_expectation():
    # The definition of dF (Wright et al. 2024), with the paper's spike of variance 1e-12.
    loc, scale, spike = mpf(-15), mpf(3), mpf("1e-6")
    with mpmath.workdps(40):

        def ratio(r):  # of q times p~ / p, with x = LOW + spike * r and p~ a half normal
            x = LOW + spike * r
            q = mpmath.npdf(x, loc, scale) / mass(loc, scale, LOW, HIGH)
            return q * 20 * 2 * mpmath.npdf(r)

        df = mpmath.log(mpmath.quad(ratio, [0, 5, 20]))
    assert float(score("bmrs-n", -15.0, 3.0)) == pytest.approx(-float(df), abs=1e-5)


@pytest.mark.parametrize("prior_scale", [4.0, 20.0])
@pytest.mark.parametrize("criterion", BMRS)
def test_a_unit_with_the_prior_has_a_score_of_zero(criterion, prior_scale):
    found = score(criterion, -20.0, prior_scale, prior_scale)
    assert float(found) == pytest.approx(0, abs=1e-6)
    # Nearly the log-uniform prior: the density at the bound is r^2 / 3 off, with r = 10 / 148.
    assert float(score(criterion, -10.0, 148.0)) == pytest.approx(0, abs=5e-3)
    check_prior(1.0, 0.919, criterion)  # which the signal-to-noise ratio refuses


def test_only_model_reduction_removes_a_unit_that_is_surely_nothing():
    # theta is e^-19.9 to ten percent: a good ratio, and the output of the unit is zero.
    found = {name: float(score(name, -19.9, 0.1)) for name in CRITERIA}
    assert found["snr"] == pytest.approx(12, abs=0.5) and found["snr"] > CRITERIA["snr"].threshold
    # log 20 + log q(a) = 2.996 + 2.303 - 0.919 - 0.5 - log Phi(1), as dF of the unit.
    assert found["bmrs-n"] == pytest.approx(-4.05, abs=0.01)
    assert found["bmrs-u"] == pytest.approx(-0.325, abs=0.001)  # log p(theta < 2^-8)
    # A unit that is surely there is kept by all.
    for name, criterion in CRITERIA.items():
        assert float(score(name, -0.1, 0.1)) > criterion.threshold


@pytest.fixture
def fitted():
    """A network of twelve units: four are there, four are the prior, four surely nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 12), nn.Sigmoid(), nn.Linear(12, 2))
    x = torch.rand(5, 3)
    model = sbp.GatedModel(net, sbp.find_gates(net, x), 5)
    guide = sbp.TruncatedLogNormalGuide(model)
    loc = torch.tensor([-0.1] * 4 + [-10.0] * 4 + [-19.9] * 4)
    log_scale = torch.tensor([0.1] * 4 + [100.0] * 4 + [0.1] * 4).log()
    guide.set_posteriors({"0": (loc, log_scale)})
    return model, guide, x


def test_prune_keeps_what_the_criterion_keeps(fitted):
    model, guide, x = fitted
    kept = {name: sbp.prune(model, guide, x, criterion=name)[0].out_features for name in CRITERIA}
    assert kept == {"snr": 8, "bmrs-n": 4, "bmrs-u": 4}
    # Under the paper's rule, dF >= 0, what fell to the prior stays.
    assert sbp.prune(model, guide, x, -0.01, criterion="bmrs-n")[0].out_features == 8


def test_a_budget_is_met_by_the_scores_that_rank(fitted):
    model, guide, x = fitted
    small = sbp.prune(model, guide, x, criterion="bmrs-n", macs_ratio=2.0)
    assert torch.equal(small[0].weight, model.gated.net[0].weight[:4])
    with pytest.raises(ValueError, match="bmrs-u does not give; use the criterion snr or bmrs-n"):
        sbp.prune(model, guide, x, criterion="bmrs-u", macs_ratio=2.0)


def test_wrong_criteria_and_thresholds_are_refused(fitted):
    model, guide, x = fitted
    with pytest.raises(ValueError, match="unknown criterion 'bmrs'; did you mean 'bmrs-"):
        sbp.prune(model, guide, x, criterion="bmrs")
    with pytest.raises(ValueError, match="expected a log Bayes factor of BMRS_N that is finite"):
        sbp.prune(model, guide, x, float("inf"), criterion="bmrs-n")
    with pytest.raises(ValueError, match=r"the largest log Bayes factor of BMRS_N is 1\.9"):
        choose_units(
            model.gated.net, model.gates, guide.mean(), {"0": torch.linspace(-3, 1.9, 12)}, x,
            criterion="bmrs-n", threshold=2.0, min_units=0,
        )  # fmt: skip
    with pytest.warns(UserWarning, match="the largest log Bayes factor of BMRS_N is "):
        sbp.prune(model, guide, x, 1e9, criterion="bmrs-n")
    assert find_criterion("bmrs-n").threshold == pytest.approx(0.919)
