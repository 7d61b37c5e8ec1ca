"""Copies of models and guides, and sites whose names nest: every parameter is found and trained."""

from __future__ import annotations

import copy
import io

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from torch import nn

import pyro_sbp as sbp


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


class LoRA(nn.Linear):
    """A dense layer that holds the layers of its low-rank update, as some code has it."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(columns, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, rows, bias=False)})

    def forward(self, x):
        return super().forward(x) + self.lora_B["default"](self.lora_A["default"](x))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = LoRA(4, 8), LoRA(8, 3)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


X, Y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3


def pair(kind, net):
    if kind == "gated":
        model = sbp.GatedModel(net, sbp.find_gates(net, X), 20)
        return model, sbp.TruncatedLogNormalGuide(model)
    model = sbp.SparseModel(net, X, 20)
    return model, sbp.AdditiveNormalGuide(model)


def svi_of(model, guide, rate=0.05):
    return SVI(model, guide, pyro.optim.Adam({"lr": rate}), TraceMeanField_ELBO())


def through_a_file(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # made by this test


def state(guide):
    return {name: value.clone() for name, value in guide.state_dict().items()}


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("kind", ["gated", "sparse"])
def test_a_copy_of_a_guide_and_the_original_are_trained_apart(kind, copied):
    model, guide = pair(kind, plain())
    svi_of(model, guide).step(X, Y)
    best = copied(guide)
    before = {name: value.clone() for name, value in best.snr().items()}
    torch.testing.assert_close(before, guide.snr())
    for _ in range(3):
        svi_of(model, guide).step(X, Y)  # the original goes on
    torch.testing.assert_close(best.snr(), before, rtol=0, atol=0)
    assert any(not torch.equal(before[name], value) for name, value in guide.snr().items())
    original = {name: value.clone() for name, value in guide.snr().items()}
    for _ in range(3):
        svi_of(best.model, best).step(X, Y)  # and so does the copy, with its own network
    torch.testing.assert_close(guide.snr(), original, rtol=0, atol=0)
    assert any(not torch.equal(before[name], value) for name, value in best.snr().items())


def test_a_guide_of_a_general_model_can_be_copied():
    def model():
        pyro.sample("t", sbp.distributions.TruncatedLogUniform())

    guide = sbp.TruncatedLogNormalGuide(model)
    assert set(copy.deepcopy(guide)()) == set(guide()) == {"t"}


@pytest.mark.parametrize("net", [plain, Nested])
@pytest.mark.parametrize("kind", ["gated", "sparse"])
@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, sbp.ClosedFormELBO])
def test_a_step_moves_every_parameter_of_network_and_guide(kind, net, elbo):
    model, guide = pair(kind, net())
    sites = set(guide.posteriors())
    own = dict(guide.named_parameters())
    if kind == "gated":
        assert {
            f"{of}.{site}_unconstrained" for site in sites for of in ("locs", "log_scales")
        } == {*own}
    parameters = {id(p): p for module in (model, guide) for p in module.parameters()}
    before = {key: p.detach().clone() for key, p in parameters.items()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo())
    for _ in range(5):
        svi.step(X, Y)
    moved = {name for name, p in [*model.named_parameters(), *own.items()]
             if not torch.equal(before[id(p)], p)}  # fmt: skip
    assert moved == {name for name, _ in [*model.named_parameters(), *own.items()]}
    assert {id(p) for p in parameters.values()} == {
        id(p) for module in (model, guide) for p in module.parameters()
    }


def test_sites_that_nest_come_back_from_a_state_dict():
    model, guide = pair("gated", Nested())
    assert {"fc1", "fc1.lora_A.default"} <= set(guide.posteriors())
    svi_of(model, guide, 0.3).step(X, Y)
    other = sbp.TruncatedLogNormalGuide(model)
    other.load_state_dict(guide.state_dict())
    torch.testing.assert_close(other.snr(), guide.snr(), rtol=0, atol=0)


@pytest.mark.parametrize("noise_per", ["batch", "example"])
@pytest.mark.parametrize("draws", [1, 7, 20])
def test_draws_of_predictive_are_apart_from_examples(noise_per, draws):
    """With as many draws as examples each example would otherwise get a draw of its own."""
    net = plain()
    model = sbp.GatedModel(net, sbp.find_gates(net, X), 20, noise_per=noise_per)
    guide = sbp.TruncatedLogNormalGuide(model, init_loc=-1.0, init_log_scale=0.0)
    settings = {"num_samples": draws, "return_sites": ("obs", "0")}
    found = Predictive(model, guide=guide, parallel=True, **settings)(X)
    assert found["obs"].shape == (draws, 20)
    one_by_one = Predictive(model, guide=guide, parallel=False, **settings)(X)
    assert found["0"].squeeze().shape == one_by_one["0"].squeeze().shape
    # One theta for all examples of a draw, and several draws.
    theta = found["0"].reshape(draws, -1, 8)
    assert theta.shape[1] == (1 if noise_per == "batch" else 20)
    assert len(theta.flatten(0, 1).unique(dim=0)) == theta.shape[0] * theta.shape[1]


def test_parallel_draws_have_the_spread_of_single_ones():
    net = plain()
    model = sbp.GatedModel(
        net, sbp.find_gates(net, X), 20, likelihood=lambda f: pyro.distributions.Delta(f[..., 0])
    )
    guide = sbp.TruncatedLogNormalGuide(model, init_loc=-1.0, init_log_scale=0.0)
    spread = [
        Predictive(model, guide=guide, num_samples=20, parallel=parallel)(X)["obs"].std(0).mean()
        for parallel in (True, False)
    ]
    assert float(spread[0] / spread[1]) == pytest.approx(1, abs=0.4)


def test_a_sparse_model_refuses_several_draws_by_their_name():
    model, guide = pair("sparse", plain())
    with pytest.raises(ValueError, match=r"use Predictive\(parallel=False\)"):
        Predictive(model, guide=guide, num_samples=5, parallel=True)(X)
