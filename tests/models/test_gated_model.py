"""GatedModel and its guide under Pyro's own tools."""

from collections import OrderedDict

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.distributions import TruncatedLogNormal


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


@pytest.fixture
def lenet():
    net = sbp.networks.LeNet5()
    x = torch.rand(4, 1, 28, 28)
    gates = sbp.find_gates(net, x, input_features=["fc1"])
    model = sbp.GatedModel(net, gates, num_data=1000)
    return model, sbp.TruncatedLogNormalGuide(model), x, torch.tensor([1, 2, 3, 4])


def test_every_gate_is_a_site_and_the_batch_counts_for_all_data(lenet):
    model, _, x, y = lenet
    trace = poutine.trace(model).get_trace(x, y)
    latent = {
        name: site["value"].shape for name, site in trace.iter_stochastic_nodes() if name != "data"
    }
    assert latent == {"conv1": (20,), "conv2": (50,), "fc1_input": (800,), "fc1": (500,)}
    assert trace.nodes["obs"]["scale"] == 250
    assert trace.nodes["obs"]["is_observed"]


def test_noise_per_example_has_a_draw_for_each(lenet):
    model, guide, x, y = lenet
    model.noise_per = "example"
    trace = poutine.trace(guide).get_trace(x, y)
    assert trace.nodes["fc1"]["value"].shape == (4, 500)
    assert trace.nodes["fc1"]["scale"] == 0.25
    rows = trace.nodes["fc1_input"]["value"]
    assert not torch.equal(rows[0], rows[1])


def test_pyro_tools_work_on_a_lenet(lenet):
    model, guide, x, y = lenet
    low, high = guide.quantiles([0.05, 0.95])["conv2"]
    assert low.shape == (50,) and bool((low < high).all())
    samples = Predictive(model, guide=guide, num_samples=3)(x)
    assert samples["obs"].shape == (3, 4)
    trace = poutine.trace(guide).get_trace(x, y)
    assert set(trace.nodes) >= {"conv1", "conv2", "fc1_input", "fc1"}
    graph = pyro.render_model(model, model_args=(x, y), render_distributions=True)
    assert "fc1_input" in graph.source and "TruncatedLogUniform" in graph.source


@pytest.mark.parametrize("noise_per", ["batch", "example"])
def test_a_gated_network_with_a_regression_likelihood(noise_per):
    """Of three hidden units two are noise: only the one that carries the signal survives."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3))
        net[1].weight.copy_(torch.tensor([[2.0, 0.01, 0.0]]))
    x = torch.randn(200, 3)
    y = 2 * x[:, :1] + 0.1 * torch.randn(200, 1)
    gates = sbp.find_gates(net, x)
    model = sbp.GatedModel(
        net,
        gates,
        num_data=200,
        noise_per=noise_per,
        likelihood=lambda output: dist.Normal(output, 0.1).to_event(1),
    )
    guide = sbp.TruncatedLogNormalGuide(model)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.05)
    elbo = TraceMeanField_ELBO()(model, guide)
    for _ in range(300):
        optimizer.zero_grad()
        (elbo(x, y) / 200).backward()
        optimizer.step()
    kept = guide.snr()["0"] >= 1
    assert kept.tolist() == [True, False, False]
    assert sbp.prune(model, guide, x)[0].out_features == 1


def test_svi_with_pyro_optim_trains_network_and_noise(lenet):
    model, guide, x, y = lenet
    before = {name: value.clone() for name, value in model.gated.net.state_dict().items()}
    loc = guide.posteriors()["fc1"].loc.detach().clone()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    for _ in range(3):
        svi.step(x, y)
    assert not torch.equal(guide.posteriors()["fc1"].loc, loc)
    after = model.gated.net.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_data": 0}, "num_data is 0"),
        ({"noise_per": "unit"}, "noise_per is 'unit'"),
        ({"prior_scale": 0.0}, "prior_scale is 0.0; expected a number > 0"),
        ({"kl_scale": -1.0}, "expected a number >= 0"),
        ({"kl_scale": float("nan")}, "expected a number >= 0"),
        ({"kl_scale": {"conv9": 1.0}}, "'conv9'; the gates are conv1, conv2, fc1_input, fc1"),
    ],
)
def test_wrong_settings_are_refused(lenet, change, words):
    model, *_ = lenet
    with pytest.raises(ValueError, match=words):
        sbp.GatedModel(model.gated.net, model.gates, **{"num_data": 10, **change})


def test_a_gate_may_not_take_the_name_of_a_site_of_the_model():
    net = torch.nn.Sequential(OrderedDict(obs=torch.nn.Linear(3, 4), out=torch.nn.Linear(4, 2)))
    gates = sbp.find_gates(net, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="a gate is named 'obs'"):
        sbp.GatedModel(net, gates, num_data=10)


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, sbp.ClosedFormELBO])
@pytest.mark.parametrize("noise_per", ["batch", "example"])
def test_the_kl_is_the_closed_one_to_the_models_own_prior(lenet, elbo, noise_per):
    model, _, x, y = lenet
    model = sbp.GatedModel(model.gated.net, model.gates, 1000, noise_per, prior_scale=3.0)
    guide = sbp.TruncatedLogNormalGuide(model, init_loc=-4.0, init_log_scale=0.5)
    prior = TruncatedLogNormal(torch.tensor(-20.0), 3.0, -20.0, 0.0)
    (q,) = (q for name, q in guide.posteriors().items() if name == "conv1")
    expected = torch.distributions.kl_divergence(q, prior.expand([20]))
    torch.testing.assert_close(guide.kl()["conv1"], expected.detach())
    u = torch.linspace(0.0005, 0.9995, 1000).double()[:, None]
    wide = TruncatedLogNormal(q.loc[:1].double(), q.scale[:1].double(), -20.0, 0.0)
    theta = wide.icdf(u)  # the KL by its definition, over quantiles
    by_hand = (wide.log_prob(theta) - prior.log_prob(theta)).mean()
    torch.testing.assert_close(by_hand.float(), expected[0].detach(), rtol=2e-3, atol=0)
    # Drawn anew the loss would differ in the KL, too, were it not in closed form.
    state = torch.get_rng_state()
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(x, y)
        replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x, y)
        nll = -replayed.nodes["obs"]["fn"].log_prob(y).sum() * 250
        torch.set_rng_state(state)
        loss = elbo().loss(model, guide, x, y)
    kl = sum(value.sum() for value in guide.kl().values())
    assert loss == pytest.approx(float(nll + kl), rel=1e-5)


def test_a_prior_is_made_once_and_follows_its_settings():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model = sbp.GatedModel(net, sbp.find_gates(net, torch.rand(2, 4)), num_data=10)
    (gate,) = model.gates
    assert model.prior(gate.name) is model.prior(gate.name)
    model.prior_scale = 2.0
    assert isinstance(model.prior(gate.name), TruncatedLogNormal)
    model.prior_scale = None
    with torch.inference_mode():
        model.prior(gate.name)
    assert not model.prior(gate.name).log_low.is_inference()
