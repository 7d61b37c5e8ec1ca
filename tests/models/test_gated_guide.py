"""TruncatedLogNormalGuide on Pyro models that have nothing to do with networks."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, init_to_median, init_to_value

import pyro_sbp as sbp
from pyro_sbp.distributions import TruncatedLogNormal, TruncatedLogUniform

TRUTH = torch.tensor([0.9, 0.0, 0.4, 0.0, 0.0])
NOISE = 0.5


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


@pytest.fixture
def data():
    x = torch.randn(300, 5)
    return x, x @ TRUTH + NOISE * torch.randn(300)


def regression(x, y=None):
    """Sparse regression: theta is a coefficient in (0, 1]."""
    with pyro.plate("features", x.shape[1]):
        theta = pyro.sample("theta", TruncatedLogUniform(-20.0, 0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ theta, NOISE), obs=y)


def regression_as_vector(x, y=None):
    theta = pyro.sample("theta", TruncatedLogUniform(-20.0, 0.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ theta, NOISE), obs=y)


def check(guide, x):
    kept = guide.snr()["theta"] >= 1
    assert kept.tolist() == (TRUTH > 0).tolist()
    torch.testing.assert_close(guide.mean()["theta"][kept], TRUTH[kept], atol=0.1, rtol=0)
    low, high = guide.quantiles([0.05, 0.95])["theta"]
    assert bool((low <= guide.median()["theta"]).all() and (guide.median()["theta"] <= high).all())


@pytest.mark.parametrize("model", [regression, regression_as_vector])
def test_sparse_regression_through_svi(model, data):
    guide = sbp.TruncatedLogNormalGuide(model, *data, init_loc=-1.0, init_log_scale=0.0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())
    for _ in range(300):
        svi.step(*data)
    check(guide, data[0])


def test_sparse_regression_through_a_torch_optimizer(data):
    model = regression_as_vector
    guide = sbp.TruncatedLogNormalGuide(model, *data, init_loc=-1.0, init_log_scale=0.0)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
    elbo = TraceMeanField_ELBO()(model, guide)
    for _ in range(300):
        optimizer.zero_grad()
        elbo(*data).backward()
        optimizer.step()
    check(guide, data[0])


def test_pyro_tools_read_the_posterior(data):
    x, y = data
    guide = sbp.TruncatedLogNormalGuide(regression, x, y)
    samples = Predictive(regression, guide=guide, num_samples=7)(x)
    assert samples["y"].shape == (7, 300)
    trace = poutine.trace(guide).get_trace(x, y)
    assert trace.nodes["theta"]["value"].shape == (5,)
    replayed = poutine.trace(poutine.replay(regression, trace)).get_trace(x, y)
    assert torch.equal(replayed.nodes["theta"]["value"], trace.nodes["theta"]["value"])
    assert "theta" in pyro.render_model(regression, model_args=(x, y)).source


def test_parameters_exist_before_the_first_call(data):
    guide = sbp.TruncatedLogNormalGuide(regression, *data)
    state = {name: value.clone() for name, value in guide.state_dict().items()}
    assert {tuple(value.shape) for value in state.values()} == {(5,)} and len(state) == 2
    other = sbp.TruncatedLogNormalGuide(regression, *data, init_loc=-2.0)
    other.load_state_dict(state)
    assert torch.equal(other.mean()["theta"], guide.mean()["theta"])


def test_a_second_guide_does_not_take_over_the_first_ones_parameters(data):
    """Pyro's parameter store would let it, and its optimizer would train nothing."""
    first = sbp.TruncatedLogNormalGuide(regression, *data, init_loc=-3.0)
    TraceMeanField_ELBO()(regression, first)(*data)
    second = sbp.TruncatedLogNormalGuide(regression, *data)
    TraceMeanField_ELBO()(regression, second)(*data)
    assert bool((second.locs.theta == 0).all()) and bool((first.locs.theta == -3).all())


def test_guides_can_be_copied_and_pickled_as_state(data):
    guide = sbp.TruncatedLogNormalGuide(regression, *data)
    twin = copy.deepcopy(guide)
    with torch.no_grad():
        next(twin.parameters()).fill_(-3.0)
    assert not torch.equal(twin.mean()["theta"], guide.mean()["theta"])


def test_parameters_stay_in_the_box_of_the_proven_numerics(data):
    guide = sbp.TruncatedLogNormalGuide(regression, *data)
    with torch.no_grad():
        guide.locs.theta.fill_(100.0)
        guide.log_scales.theta.fill_(-100.0)
    (q,) = guide.posteriors().values()
    assert bool((q.loc == 5).all()) and torch.allclose(q.scale, torch.tensor(-10.0).exp())
    assert all(bool(v["theta"].isfinite().all()) for v in (guide.mean(), guide.snr(), guide.kl()))


def test_a_posterior_may_be_kept_as_narrow_as_its_prior(data):
    guide = sbp.TruncatedLogNormalGuide(regression, *data, max_log_scale=0.5)
    with torch.no_grad():
        guide.log_scales.theta.fill_(2.0)
    (q,) = guide.posteriors().values()
    assert torch.allclose(q.scale, torch.tensor(0.5).exp())
    with pytest.raises(ValueError, match="max_log_scale is 6"):
        sbp.TruncatedLogNormalGuide(regression, *data, max_log_scale=6.0)


def test_a_posterior_of_gates_is_no_wider_than_their_prior():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    gates = sbp.find_gates(net, torch.randn(2, 4))
    for prior_scale, widest in ((None, 5.0), (2.0, 0.6931), (3e9, 5.0)):
        guide = sbp.TruncatedLogNormalGuide(
            sbp.GatedModel(net, gates, num_data=10, prior_scale=prior_scale), init_log_scale=-1.0
        )
        (gate,) = gates
        with torch.no_grad():
            getattr(guide.log_scales, gate.name).fill_(9.0)
        (q,) = guide.posteriors().values()
        assert float(q.scale.detach().log().max()) == pytest.approx(widest, abs=1e-4)


def test_subsampled_plates_get_parameters_of_the_whole(data):
    def model(x):
        with pyro.plate("items", 10, subsample_size=3):
            return pyro.sample("theta", TruncatedLogUniform(-20.0, 0.0))

    guide = sbp.TruncatedLogNormalGuide(model, data[0])
    assert guide.mean()["theta"].shape == (10,)
    trace = poutine.trace(guide).get_trace(data[0])
    assert trace.nodes["theta"]["value"].shape == (3,)


def test_it_composes_with_other_guides(data):
    x, y = data

    def model(x, y=None):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        theta = pyro.sample("theta", TruncatedLogUniform(-20.0, 0.0).expand([5]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ theta, scale), obs=y)

    with pytest.raises(ValueError, match=r"'scale' has the prior LogNormal"):
        sbp.TruncatedLogNormalGuide(model, x, y)
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["scale"])))
    block = poutine.block(model, expose=["theta"])
    guide.append(sbp.TruncatedLogNormalGuide(block, x, y, init_loc=-1.0, init_log_scale=0.0))
    svi = SVI(
        model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.995}), TraceMeanField_ELBO()
    )
    for _ in range(300):
        svi.step(x, y)
    assert float(guide.median()["scale"]) == pytest.approx(NOISE, abs=0.05)


def test_a_model_without_latent_sites_is_refused(data):
    with pytest.raises(ValueError, match="no latent site"):
        sbp.TruncatedLogNormalGuide(lambda: None)


def test_a_prior_that_leans_to_zero(data):
    def model(x, y=None):
        with pyro.plate("features", 5):
            theta = pyro.sample("theta", TruncatedLogNormal(-20.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ theta, NOISE), obs=y)

    guide = sbp.TruncatedLogNormalGuide(model, *data, init_loc=-1.0, init_log_scale=0.0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())
    for _ in range(300):
        svi.step(*data)
    check(guide, data[0])
    prior = TruncatedLogNormal(torch.tensor(-20.0), 3.0).expand([5])
    expected = torch.distributions.kl_divergence(guide.posteriors()["theta"], prior)
    torch.testing.assert_close(guide.kl()["theta"], expected.detach())
    assert bool((guide.kl()["theta"][TRUTH > 0] > 20).all())


INPUTS = torch.ones(10, 5), torch.ones(10)


def two_sites(x, y=None):
    with pyro.plate("features", 5):
        theta = pyro.sample("theta", sbp.distributions.TruncatedLogUniform(-20.0, 0.0))
    other = pyro.sample("other", sbp.distributions.TruncatedLogUniform(-2.0, 0.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ theta + other, 0.5), obs=y)


def test_initial_values_are_set_by_site_and_by_element():
    guide = sbp.TruncatedLogNormalGuide(
        two_sites,
        *INPUTS,
        init_loc={"theta": torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])},
        init_log_scale={"other": -1.0},
    )
    q = guide.posteriors()
    assert q["theta"].loc.tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert q["other"].loc.item() == 0
    assert q["theta"].scale.log()[0].item() == pytest.approx(-5)
    assert q["other"].scale.log().item() == pytest.approx(-1)


def test_initial_values_come_from_functions_of_pyro():
    values = {"theta": torch.tensor([0.5, 0.1, 1e-30, 1.0, 0.2]), "other": torch.tensor(0.4)}
    guide = sbp.TruncatedLogNormalGuide(
        two_sites, *INPUTS, init_loc_fn=init_to_value(values=values)
    )
    q = guide.posteriors()
    # Values out of the support are at its bounds.
    expected = values["theta"].log().clamp(-20, 0)
    torch.testing.assert_close(q["theta"].loc.detach(), expected)
    assert q["other"].loc.item() == pytest.approx(math.log(0.4))


def test_the_scale_of_a_general_model_is_at_most_a_third_of_the_width_of_the_support():
    guide = sbp.TruncatedLogNormalGuide(two_sites, *INPUTS, init_log_scale=4.9)
    assert guide.posteriors()["theta"].scale.tolist() == pytest.approx([20.0 / 3] * 5)
    assert guide.posteriors()["other"].scale.item() == pytest.approx(2.0 / 3)


def test_the_scale_of_a_wide_prior_can_be_reached():
    def model():
        pyro.sample("theta", sbp.distributions.TruncatedLogNormal(-10.0, 10.0))

    guide = sbp.TruncatedLogNormalGuide(model, init_loc=-10.0, init_log_scale=math.log(10))
    assert float(guide.kl()["theta"]) == pytest.approx(0, abs=1e-6)


def test_a_fit_that_starts_from_wide_posteriors_does_not_stay_at_flat_ones():
    pyro.set_rng_seed(0)
    x = torch.randn(300, 5)
    y = x @ torch.tensor([0.9, 0.0, 0.4, 0.0, 0.0]) + 0.5 * torch.randn(300)

    def model():
        with pyro.plate("features", 5):
            theta = pyro.sample("theta", sbp.distributions.TruncatedLogUniform(-20.0, 0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ theta, 0.5), obs=y)

    elbo = sbp.ClosedFormELBO()
    guide = sbp.TruncatedLogNormalGuide(model, init_loc=-1.0, init_log_scale=0.0)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    for _ in range(600):
        svi.step()
    # With scales up to the width of the support, it is 281; with the best settings, 225.
    assert sum(elbo.loss(model, guide) for _ in range(100)) / 100 < 245


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_loc": {"thta": 0.0}}, "no site 'thta'.* the sites are theta, other"),
        ({"init_log_scale": {"y": 0.0}}, "no site 'y'"),
        ({"init_loc": {"theta": torch.zeros(3)}}, r"'theta' has shape \[3\]; expected .*\[5\]"),
        ({"init_loc": 0.0, "init_loc_fn": init_to_median}, "give only one of them"),
    ],
)
def test_wrong_initial_values_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        sbp.TruncatedLogNormalGuide(two_sites, *INPUTS, **settings)


@pytest.mark.parametrize("seed", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_example_of_the_readme_finds_which_coefficients_carry_signal(seed):
    pyro.set_rng_seed(seed)
    x = torch.randn(300, 5)
    y = x @ torch.tensor([0.9, 0.0, 0.4, 0.0, 0.0]) + 0.5 * torch.randn(300)

    def model(x, y=None):
        with pyro.plate("features", 5):
            theta = pyro.sample("theta", sbp.distributions.TruncatedLogUniform(-20.0, 0.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ theta, 0.5), obs=y)

    guide = sbp.TruncatedLogNormalGuide(model, x, y, init_loc=-6.0, init_log_scale=0.0)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), sbp.ClosedFormELBO())
    with pyro.validation_enabled(False):
        for _ in range(600):
            svi.step(x, y)
        loss = sum(svi.evaluate_loss(x, y) for _ in range(50)) / 50
    q = guide.posteriors()["theta"]
    # Least squares has a deviation of 0.5 / sqrt(300) = 0.029 for each coefficient.
    signal = q.mean[[0, 2]].detach()
    torch.testing.assert_close(signal, torch.tensor([0.9, 0.4]), rtol=0, atol=0.09)
    assert q.stddev[[0, 2]].max().item() < 0.09
    assert q.mean[[1, 3, 4]].max().item() < 0.09
    assert (q.snr >= 1).tolist() == [True, False, True, False, False]
    # A flat posterior has more than 260.
    assert loss < 250
