"""A training step never asks the device for a number: the host runs ahead of it."""

import importlib
from collections import Counter
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_sbp as sbp
from pyro_sbp.models.elbo import ClosedFormELBO
from pyro_sbp.networks import LeNet5

#: What reads values on the host, or makes shapes of them.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func._schema.name.removeprefix("aten::")) in WAITS:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def step(elbo, noise_per):
    """A whole step, the optimizer's part included, and what of it waited."""
    torch.manual_seed(0)
    net, x, y = LeNet5(), torch.randn(4, 1, 28, 28), torch.tensor([1, 2, 3, 4])
    if noise_per == "weight":
        model: Any = sbp.SparseModel(net, x, num_data=100)
        guide: Any = sbp.AdditiveNormalGuide(model)
    else:
        gates = sbp.find_gates(net, x, input_features=["fc1"])
        model = sbp.GatedModel(net, gates, num_data=100, noise_per=noise_per)
        guide = sbp.TruncatedLogNormalGuide(model)
    parameters = list({id(p): p for p in (*model.parameters(), *guide.parameters())}.values())
    optimizer = torch.optim.Adam(parameters, fused=True)
    with pyro.validation_enabled(False), Count() as count:
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide, x, y).backward()
        optimizer.step()
    return count.waits


@pytest.fixture
def elsewhere(monkeypatch):
    """Compute as on a device that is not the CPU, where no value may decide."""
    for name in (
        "special.frame", "special.blocks", "special.by_erf", "special.integrals",
        "distributions.fast_sampling", "distributions.kl",
    ):  # fmt: skip
        module = importlib.import_module(f"pyro_sbp.{name}")
        monkeypatch.setattr(module, "may_look", lambda x: False)


@pytest.mark.parametrize("noise_per", ["batch", "example", "weight"])
def test_the_closed_form_never_waits(noise_per, elsewhere):
    assert step(ClosedFormELBO(), noise_per) == {}


def test_what_waits_is_counted():
    assert step(TraceMeanField_ELBO(), "batch")["_local_scalar_dense"] > 0
