"""The loss of a gated model without traces equals that of the traces, or the traces are used."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger

import pyro_sbp as sbp
from pyro_sbp.models.elbo import ClosedFormELBO
from pyro_sbp.models.untraced import untraced_kl, untraced_terms

pytestmark = pytest.mark.usefixtures("seeded")


def gated(model_class=sbp.GatedModel, **settings):
    """A network with two gates, of 5 and 4 units."""
    layers = torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4), torch.nn.Linear(4, 2)
    net, x = torch.nn.Sequential(*layers), torch.randn(8, 3)
    model = model_class(net, sbp.find_gates(net, x), 40, **settings)
    guide = sbp.TruncatedLogNormalGuide(model, init_loc=-1.0, init_log_scale=-1.0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, guide, x, torch.randint(2, (8,))


def loss_and_gradients(elbo, model, guide, x, y):
    pyro.set_rng_seed(3)
    loss = elbo.differentiable_loss(model, guide, x, y)
    parameters = [*guide.parameters(), *model.gated.net.parameters()]
    return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)


def assert_as_pyro(model, guide, x, y, particles=1):
    found, expected = (
        loss_and_gradients(elbo(num_particles=particles), model, guide, x, y)
        for elbo in (ClosedFormELBO, TraceMeanField_ELBO)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise_per", ["batch", "example"])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize(
    "settings", [{"kl_scale": {"0": 2.5, "2": 0.0}}, {"prior_scale": 4.0}, {"kl_scale": 3.0}]
)
def test_draw_by_draw_as_pyros_elbo(noise_per, particles, settings):
    model, guide, x, y = gated(noise_per=noise_per, **settings)
    assert untraced_terms(model, guide, (x, y), {}) is not None
    assert_as_pyro(model, guide, x, y, particles)


@pytest.mark.parametrize("noise_per", ["batch", "example"])
@pytest.mark.parametrize(
    "settings", [{"kl_scale": {"0": 2.5, "2": 0.0}}, {"prior_scale": 4.0}, {"kl_scale": 3.0}]
)
def test_the_divergence_alone_is_that_of_pyros_elbo_without_labels(noise_per, settings):
    model, guide, x, _ = gated(noise_per=noise_per, **settings)
    parameters = [*guide.parameters()]
    traced = TraceMeanField_ELBO().differentiable_loss(
        lambda x: model.sample_sites(model.prior, x), guide, x
    )
    expected = traced.detach(), torch.autograd.grad(traced, parameters)
    state = torch.get_rng_state()
    kl = untraced_kl(model, guide)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
    found = kl.detach(), torch.autograd.grad(kl, parameters, materialize_grads=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float(found[0]) > 0


def test_without_weight_there_is_no_divergence():
    model, guide, x, y = gated(kl_scale=0.0)
    assert float(ClosedFormELBO().parts(model, guide, x, y).kl) == 0


def test_effect_handlers_see_all_sites():
    seen = set()

    class Names(Messenger):
        def _pyro_sample(self, msg):
            seen.add(msg["name"])

    model, guide, x, y = gated()
    with Names():
        ClosedFormELBO().parts(model, guide, x, y)
    assert {"0", "2", "obs"} <= seen


def test_a_handler_that_scales_sites_is_applied():
    model, guide, x, y = gated()
    alone = ClosedFormELBO().parts(model, guide, x, y).kl
    with poutine.scale(scale=2.0):
        scaled = ClosedFormELBO().parts(model, guide, x, y).kl
    torch.testing.assert_close(scaled, 2 * alone)


def test_a_model_of_another_class_is_called():
    class Doubled(sbp.GatedModel):
        def forward(self, x, y=None):
            with poutine.scale(scale=2.0):
                return super().forward(x, y)

    model, guide, x, y = gated(Doubled)
    assert untraced_terms(model, guide, (x, y), {}) is None
    assert_as_pyro(model, guide, x, y)


def test_hooks_and_replaced_methods_are_called():
    model, guide, x, y = gated()
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append("hook"))
    ClosedFormELBO().parts(model, guide, x, y)
    handle.remove()
    own = guide.forward
    guide.forward = lambda *args: calls.append("guide") or own(*args)
    ClosedFormELBO().parts(model, guide, x, y)
    assert calls == ["hook", "guide"]


def test_a_factor_in_the_likelihood_is_part_of_the_loss():
    def likelihood(output):
        pyro.factor("penalty", -output.square().sum())
        return dist.Categorical(logits=output)

    model, guide, x, y = gated(likelihood=likelihood)
    ClosedFormELBO().parts(model, guide, x, y)
    assert model.has_sites_inside
    assert_as_pyro(model, guide, x, y)


def test_a_latent_site_in_the_likelihood_is_refused():
    def likelihood(output):
        temperature = pyro.sample("temperature", dist.Exponential(1.0))
        return dist.Categorical(logits=output / temperature)

    model, guide, x, y = gated(likelihood=likelihood)
    with (
        pytest.warns(UserWarning, match="temperature"),
        pytest.raises(ValueError, match="'temperature' of the model is not in the guide"),
    ):
        ClosedFormELBO().parts(model, guide, x, y)


def test_a_likelihood_for_the_wrong_number_of_examples_is_refused():
    def likelihood(output):
        return dist.Categorical(logits=output[:3])

    model, guide, x, y = gated(likelihood=likelihood)
    with pytest.raises(ValueError, match=r"batch shape \[3\]; expected \[8\]"):
        ClosedFormELBO().parts(model, guide, x, y[:3])


def test_labels_outside_the_support_are_refused():
    model, guide, x, y = gated()
    with pytest.raises(ValueError, match="support"):
        ClosedFormELBO().parts(model, guide, x, y + 7)


def test_parameters_of_the_store_are_used(tmp_path):
    model, guide, x, y = gated()
    ClosedFormELBO().parts(model, guide, x, y)
    store = pyro.get_param_store()
    names = set(store.keys())
    assert any("locs" in name for name in names) and any("weight" in name for name in names)
    store.save(tmp_path / "store")
    before = ClosedFormELBO().parts(model, guide, x, y).kl.detach()
    with torch.no_grad():
        for parameter in guide.locs.parameters():
            parameter.sub_(1.0)
    assert abs(ClosedFormELBO().parts(model, guide, x, y).kl.detach() - before) > 0.1
    pyro.clear_param_store()
    store.load(tmp_path / "store")
    torch.testing.assert_close(ClosedFormELBO().parts(model, guide, x, y).kl.detach(), before)
