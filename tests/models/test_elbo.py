"""The loss: closed-form KLs, counted once, for both kinds of noise."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch.distributions import kl_divergence

import pyro_sbp as sbp
from pyro_sbp.models.elbo import ClosedFormELBO, _divergence


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


def gated(noise_per="batch", kl_scale=1.0, scale=-1.0, num_data=40):
    """A linear network, in which the expected loss of Gaussian labels has a closed form."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    gates = sbp.find_gates(net, x)
    model = sbp.GatedModel(
        net,
        gates,
        num_data,
        noise_per=noise_per,
        kl_scale=kl_scale,
        likelihood=lambda output: dist.Normal(output, 1.0).to_event(1),
    )
    guide = sbp.TruncatedLogNormalGuide(model, init_loc=-1.0, init_log_scale=scale).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, guide, x, torch.randn(8, 2, dtype=torch.float64)


def expected_loss(model, guide, x, y):
    """E[-log p(y | x, theta)] over the data, by hand: the output is linear in theta."""
    (q,) = guide.posteriors().values()
    first, second = model.gated.net
    hidden = first(x)
    mean = (hidden * q.mean) @ second.weight.T + second.bias
    variance = (hidden**2 * q.variance) @ second.weight.T**2
    log_density = -0.5 * ((y - mean) ** 2 + variance + torch.log(torch.tensor(2 * torch.pi)))
    return -log_density.sum() * model.num_data / len(x)


@pytest.mark.parametrize("noise_per", ["batch", "example"])
@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, ClosedFormELBO])
def test_expected_loss_is_the_same_for_both_kinds_of_noise(noise_per, elbo):
    model, guide, x, y = gated(noise_per)
    with torch.no_grad():
        expected = expected_loss(model, guide, x, y) + sum(v.sum() for v in guide.kl().values())
        draws = torch.stack(
            [elbo().differentiable_loss(model, guide, x, y).detach().double() for _ in range(300)]
        )
    # Five standard errors of the mean of the draws.
    bound = 5 * draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - expected) < bound
    assert bound < 0.05 * expected


@pytest.mark.parametrize("noise_per", ["batch", "example"])
@pytest.mark.parametrize("kl_scale", [1.0, 7.0, 0.0, {"0": 2.5}])
def test_both_elbos_agree_draw_by_draw(noise_per, kl_scale):
    model, guide, x, y = gated(noise_per, kl_scale)
    losses, gradients = [], []
    for elbo in (TraceMeanField_ELBO(), ClosedFormELBO()):
        pyro.set_rng_seed(3)
        loss = elbo.differentiable_loss(model, guide, x, y)
        parameters = [*guide.parameters(), *model.gated.net.parameters()]
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, parameters))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("noise_per", ["batch", "example"])
def test_the_kl_part_is_the_closed_form_counted_once(noise_per):
    """Nothing of the KL is sampled: it does not depend on the draw, and equals the guide's."""
    model, guide, x, y = gated(noise_per, kl_scale=3.0)
    kl = 3 * sum(float(value.sum()) for value in guide.kl().values())
    for batch in (8, 3):
        parts = ClosedFormELBO().parts(model, guide, x[:batch], y[:batch])
        assert float(parts.kl.detach()) == pytest.approx(kl, rel=1e-12)


@pytest.mark.parametrize("noise_per", ["batch", "example"])
def test_trace_mean_field_elbo_uses_the_closed_form(noise_per):
    """What is left of its loss without the likelihood is the closed form, whatever the draw."""
    model, guide, x, y = gated(noise_per)
    kl = sum(float(value.sum()) for value in guide.kl().values())
    for seed in range(3):
        pyro.set_rng_seed(seed)
        loss = float(TraceMeanField_ELBO().differentiable_loss(model, guide, x, y).detach())
        pyro.set_rng_seed(seed)
        nll = float(ClosedFormELBO().parts(model, guide, x, y).nll.detach())
        assert loss - nll == pytest.approx(kl, rel=1e-10)


def test_svi_takes_the_closed_form_elbo():
    model, guide, x, y = gated()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), ClosedFormELBO())
    first = sum(svi.step(x, y) for _ in range(20))
    for _ in range(100):
        svi.step(x, y)
    assert sum(svi.step(x, y) for _ in range(20)) < first


def test_a_site_without_a_closed_form_is_refused():
    def model(x):
        pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError):
        ClosedFormELBO().parts(model, guide, torch.zeros(()))
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="latent site 'z' of the model is not in the guide"),
    ):
        ClosedFormELBO().parts(model, lambda x: None, torch.zeros(()))


def test_the_kl_of_a_plates_copies_is_summed_once():
    # Once over [4] and not over the copies [1000, 4]; with the value of all of them.
    loc = torch.zeros(4, requires_grad=True)
    q = sbp.distributions.TruncatedLogNormal(loc, torch.ones(4)).expand([1000, 4]).to_event(1)
    p = sbp.distributions.TruncatedLogUniform().expand([1000, 4]).to_event(1)
    found = _divergence(q, p)
    assert found.shape == (1000,) and found.stride() == (0,)
    torch.testing.assert_close(found, kl_divergence(q, p))
