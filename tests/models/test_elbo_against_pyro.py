"""`ClosedFormELBO` against Pyro's `TraceMeanField_ELBO`: the same value, the same checks."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, TraceMeanField_ELBO, autoguide
from pyro.infer.autoguide.initialization import init_to_sample
from torch.distributions import constraints

import pyro_sbp as sbp
from pyro_sbp.models.elbo import ClosedFormELBO

DATA = torch.tensor([0.5, -0.3, 1.2, 0.8, 2.0])


pytestmark = pytest.mark.usefixtures("seeded")


def local_model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(DATA)):
        w = pyro.sample("w", dist.Normal(z, 2.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=DATA)


def local_guide():
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.5))
    with pyro.plate("data", len(DATA)):
        pyro.sample("w", dist.Normal(pyro.param("locs", torch.zeros(5)), 0.7))


def subsampled_model():
    z = pyro.sample("z", dist.Gamma(2.0, 3.0))
    with pyro.plate("data", len(DATA), subsample_size=2) as index:
        with poutine.scale(scale=0.5):
            w = pyro.sample("w", dist.Normal(0.0, z.sqrt()))
        pyro.sample("x", dist.Normal(w, 1.0), obs=DATA[index])


def subsampled_guide():
    pyro.sample("z", dist.Gamma(pyro.param("a", torch.tensor(3.0)), 2.0))
    locs = pyro.param("locs", torch.zeros(5))
    with pyro.plate("data", len(DATA), subsample_size=2) as index, poutine.scale(scale=0.5):
        pyro.sample("w", dist.Normal(locs[index], 0.7))


def masked_model():
    mask = torch.tensor([True, False, True, True, False])
    with pyro.plate("data", len(DATA)), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=DATA)
    pyro.factor("f", -z.square().sum())


def masked_guide():
    mask = torch.tensor([True, False, True, True, False])
    with pyro.plate("data", len(DATA)), poutine.mask(mask=mask):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(5)), 0.5))


def nested_model():
    with pyro.plate("rows", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 5, dim=-1):
            b = pyro.sample("b", dist.LogNormal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=DATA)


def nested_guide():
    scale = pyro.param("scale", torch.ones(3, 1), constraint=constraints.positive)
    with pyro.plate("rows", 3, dim=-2):
        pyro.sample("a", dist.Normal(0.1, scale))
        with pyro.plate("columns", 5, dim=-1):
            pyro.sample("b", dist.LogNormal(torch.zeros(3, 5), 0.5))


def vector_model():
    z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    with pyro.plate("data", len(DATA)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=DATA)


def vector_guide():
    # An auxiliary site from which the latent site is computed.
    scale = pyro.param("scale", torch.tensor(1.3))
    base = dist.Normal(torch.zeros(5), scale).to_event(1)
    u = pyro.sample("u", base, infer={"is_auxiliary": True})
    pyro.sample("z", dist.Delta(0.3 * u + 0.1, event_dim=1))


def truncated_model():
    with pyro.plate("units", 5):
        theta = pyro.sample("theta", sbp.distributions.TruncatedLogUniform())
        pyro.sample("x", dist.Normal(theta, 1.0), obs=DATA)


def truncated_guide():
    loc = pyro.param("loc", torch.full((5,), -1.0))
    with pyro.plate("units", 5):
        pyro.sample("theta", sbp.distributions.TruncatedLogNormal(loc, 0.5))


def sequential_model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(DATA), subsample_size=3):
        w = pyro.sample(f"w_{i}", dist.Normal(z, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(w, 1.0), obs=DATA[i])


def sequential_guide():
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))
    locs = pyro.param("locs", torch.zeros(5))
    for i in pyro.plate("data", len(DATA), subsample_size=3):
        pyro.sample(f"w_{i}", dist.Normal(locs[i], 0.7))


def conjugate_model():
    rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
    p = pyro.sample("p", dist.Beta(1.5, 2.5))
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("data", 4):
        pyro.sample("count", dist.Poisson(rate), obs=torch.tensor([0.0, 1.0, 2.0, 1.0]))
        pyro.sample("wait", dist.Exponential(rate), obs=torch.tensor([0.3, 1.0, 0.2, 2.0]))
        pyro.sample("coin", dist.Bernoulli(p), obs=torch.tensor([1.0, 0.0, 1.0, 1.0]))
        pyro.sample("kind", dist.Categorical(weights), obs=torch.tensor([0, 2, 2, 1]))


def conjugate_guide():
    positive = {"constraint": constraints.positive}
    a = pyro.param("a", torch.tensor(3.0), **positive)
    pyro.sample("rate", dist.Gamma(a, 2.5))
    pyro.sample("p", dist.Beta(pyro.param("b", torch.tensor(2.0), **positive), 2.0))
    c = pyro.param("c", torch.ones(3), **positive)
    pyro.sample("weights", dist.Dirichlet(c))


def correlated_model():
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))
    with pyro.plate("data", len(DATA)):
        pyro.sample("x", dist.Normal(z[0] + z[1], 1.0), obs=DATA)


def correlated_guide():
    loc = pyro.param("loc", torch.tensor([0.2, -0.1]))
    tril = pyro.param("tril", torch.eye(2), constraint=constraints.lower_cholesky)
    pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))


def conditioned_model():
    """A latent site of it is observed, and a deterministic site is left out."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        u = pyro.sample("u", dist.Normal(z, 1.0))
        pyro.deterministic("square", u.square())
        pyro.sample("x", dist.Normal(u, 1.0), obs=DATA[0])

    poutine.condition(model, data={"u": torch.tensor(0.7)})()


def conditioned_guide():
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.5))


def scaled_model():
    with poutine.scale(scale=0.3):
        local_model()


def scaled_guide():
    with poutine.scale(scale=0.3):
        local_guide()


PAIRS = {
    "sequential": (sequential_model, sequential_guide),
    "conjugate": (conjugate_model, conjugate_guide),
    "correlated": (correlated_model, correlated_guide),
    "conditioned": (conditioned_model, conditioned_guide),
    "scaled": (scaled_model, scaled_guide),
    "local": (local_model, local_guide),
    "subsampled": (subsampled_model, subsampled_guide),
    "masked": (masked_model, masked_guide),
    "nested": (nested_model, nested_guide),
    "auxiliary": (vector_model, vector_guide),
    "truncated": (truncated_model, truncated_guide),
}
AUTOGUIDES = [
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
    autoguide.AutoDelta,
    autoguide.AutoIAFNormal,
    autoguide.AutoStructured,
]


def values(elbos, model, guide):
    """The loss by every ELBO with the same draws, and the gradients."""
    found = []
    for elbo in elbos:
        for parameter in pyro.get_param_store().values():
            parameter.unconstrained().grad = None
        pyro.set_rng_seed(3)
        found.append(elbo.loss_and_grads(model, guide))
        store = pyro.get_param_store()
        found.append({name: store[name].unconstrained().grad for name in sorted(store.keys())})
    return found


def agree(model, guide, **settings):
    pyro.set_rng_seed(3)
    guide()  # its parameters exist
    ours, grads, theirs, their_grads = values(
        [ClosedFormELBO(**settings), TraceMeanField_ELBO(**settings)], model, guide
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert grads.keys() == their_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, their_grads[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("particles", [1, 3])
def test_the_loss_and_its_gradients_are_those_of_pyro(name, particles):
    agree(*PAIRS[name], num_particles=particles)


@pytest.mark.parametrize("name", ["local", "scaled", "nested", "auxiliary", "truncated"])
def test_particles_are_vectorized_as_in_pyro(name):
    agree(*PAIRS[name], num_particles=4, vectorize_particles=True, max_plate_nesting=2)


@pytest.mark.parametrize("kind", AUTOGUIDES)
@pytest.mark.parametrize("model", [local_model, vector_model, truncated_model])
def test_autoguides_have_the_loss_of_pyro(kind, model):
    # AutoIAFNormal does not use initial values.
    guide = (
        kind(model) if kind is autoguide.AutoIAFNormal else kind(model, init_loc_fn=init_to_sample)
    )
    with warnings.catch_warnings():
        # Pyro itself warns that the sites of some autoguides have another order.
        warnings.filterwarnings("ignore", "Failed to verify mean field", UserWarning)
        agree(model, guide)


def test_the_deviation_of_an_autoguide_is_the_exact_one():
    """Without the entropy of auxiliary sites it would shrink to zero."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(20))

    guide = autoguide.AutoNormal(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), ClosedFormELBO(4))
    scales = []
    for step in range(300):
        svi.step()
        if step >= 150:
            scales.append(guide.scales.z.item())
    # Adam's steps leave noise of some percent.
    assert sum(scales) / len(scales) == pytest.approx(21**-0.5, rel=0.1)


def test_a_guide_that_is_not_reparameterized_is_refused():
    def model():
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide():
        pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))

    with pytest.raises(NotImplementedError, match="site 'z' is not reparameterized"):
        ClosedFormELBO().loss(model, guide)


def test_a_site_that_only_the_guide_has_is_refused():
    def guide():
        local_guide()
        pyro.sample("u", dist.Normal(0.0, 1.0))

    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match=r"'u' of the guide is not in the model.*is_auxiliary"),
    ):
        ClosedFormELBO().loss(local_model, guide)


def test_a_prior_of_another_shape_than_the_posterior_is_refused():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(5), 1.0))

    for elbo in (TraceMeanField_ELBO(), ClosedFormELBO()):
        with pytest.raises(ValueError, match="z"):
            elbo.loss(model, guide)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("labels", [(64, 1), (64,)])
def test_labels_of_another_shape_than_the_likelihood_are_refused(validate, labels):
    x, y = torch.randn(64, 10), torch.randn(*labels)
    net = torch.nn.Sequential(torch.nn.Linear(10, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    gates = sbp.find_gates(net, x[:4])

    def loss(likelihood):
        model = sbp.GatedModel(net, gates, 64, likelihood=likelihood)
        with pyro.validation_enabled(validate):
            return ClosedFormELBO().loss(model, sbp.TruncatedLogNormalGuide(model), x, y)

    with pytest.raises(ValueError, match=r"likelihood has batch shape \[64, 1\].*to_event"):
        loss(lambda output: dist.Normal(output, 0.7))
    flat = lambda output: dist.Normal(output[:, 0], 0.7)  # noqa: E731
    if len(labels) == 1:
        assert loss(flat) < 1000
    else:
        with pytest.raises(ValueError, match=r"labels have shape \[64, 1\]; expected \[64\]"):
            loss(flat)


@pytest.mark.parametrize("validate", [True, False])
def test_labels_without_the_event_dimensions_of_the_likelihood_are_refused(validate):
    x, y = torch.randn(64, 10), torch.randn(64)
    net = torch.nn.Sequential(torch.nn.Linear(10, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    of_output = lambda output: dist.Normal(output, 0.7).to_event(1)  # noqa: E731
    model = sbp.GatedModel(net, sbp.find_gates(net, x[:4]), 64, likelihood=of_output)
    guide = sbp.TruncatedLogNormalGuide(model)
    with pyro.validation_enabled(validate):
        assert ClosedFormELBO().loss(model, guide, x, y[:, None]) < 1000
        with pytest.raises(ValueError, match=r"labels have shape \[64\]; expected \[64, 1\]"):
            ClosedFormELBO().loss(model, guide, x, y)


def test_a_likelihood_that_takes_examples_for_draws_is_refused():
    x = torch.randn(16, 4)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    gates = sbp.find_gates(net, x)

    def losses(likelihood):
        model = sbp.GatedModel(net, gates, 16, likelihood=likelihood)
        guide = sbp.TruncatedLogNormalGuide(model)
        y = net(x).detach()[:, 0]
        found = Predictive(model, guide=guide, num_samples=7, parallel=True)(x)["obs"]
        torch.testing.assert_close(found.mean(0), y, rtol=0, atol=0.1)
        settings = {"max_plate_nesting": 1, "vectorize_particles": True}
        for elbo in (ClosedFormELBO(7, **settings), TraceMeanField_ELBO(7, **settings)):
            yield elbo.loss(model, guide, x, y)

    assert all(loss < 1e6 for loss in losses(lambda o: dist.Normal(o[..., 0], 1e-3)))
    with pytest.raises(ValueError, match=r"batch shape \[7, 1\]; expected \[7, 16\].*\.\.\., 0"):
        list(losses(lambda o: dist.Normal(o[:, 0], 1e-3)))


def test_a_likelihood_of_sequences_takes_labels_of_any_length():
    x, y = torch.randn(16, 4), torch.randn(16, 7)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    switching, emitted = torch.zeros(2, 2), dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
    likelihood = lambda output: dist.DiscreteHMM(output, switching, emitted)  # noqa: E731
    model = sbp.GatedModel(net, sbp.find_gates(net, x), 16, likelihood=likelihood)
    guide = sbp.TruncatedLogNormalGuide(model)
    for elbo in (TraceMeanField_ELBO(), ClosedFormELBO()):
        assert math.isfinite(elbo.loss(model, guide, x, y))


def test_one_draw_may_be_squeezed():
    x = torch.randn(16, 4)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    of_output = lambda output: dist.Normal(output.squeeze(), 0.1)  # noqa: E731
    model = sbp.GatedModel(net, sbp.find_gates(net, x), 16, likelihood=of_output)
    guide = sbp.TruncatedLogNormalGuide(model)
    found = Predictive(model, guide=guide, num_samples=1, parallel=True)(x)["obs"]
    assert found.numel() == 16


def test_a_loss_without_trainable_parameters_is_a_number():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    for elbo in (TraceMeanField_ELBO(), ClosedFormELBO()):
        assert elbo.loss_and_grads(model, lambda: None) == pytest.approx(1.4189385)


def test_a_loss_that_is_nan_gives_pyro_s_warning():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(math.nan))

    with pyro.validation_enabled(False):
        for elbo in (TraceMeanField_ELBO(), ClosedFormELBO()):
            for of in (elbo.loss, elbo.loss_and_grads):
                with pytest.warns(UserWarning, match="Encountered NaN: loss"):
                    of(model, lambda: None)


def test_retain_graph_is_honoured():
    shared = torch.tensor(0.5, requires_grad=True).exp()
    loc = torch.tensor(0.1, requires_grad=True)

    def model():
        pyro.sample("z", dist.Normal(shared, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(loc * shared, 1.0))

    for elbo in (TraceMeanField_ELBO(retain_graph=True), ClosedFormELBO(retain_graph=True)):
        assert elbo.loss_and_grads(model, guide) == elbo.loss_and_grads(model, guide)
    elbo.retain_graph = False
    elbo.loss_and_grads(model, guide)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        elbo.loss_and_grads(model, guide)


@pytest.mark.parametrize("noise_per", ["batch", "example"])
def test_an_empty_minibatch_is_refused(noise_per):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    model = sbp.GatedModel(net, sbp.find_gates(net, torch.randn(2, 4)), 16, noise_per=noise_per)
    guide = sbp.TruncatedLogNormalGuide(model)
    x, y = torch.randn(0, 4), torch.randint(3, (0,))
    for elbo in (ClosedFormELBO(), TraceMeanField_ELBO()):
        with pytest.raises(ValueError, match="the minibatch is empty"):
            elbo.loss(model, guide, x, y)
