"""Networks by name."""

from __future__ import annotations

import sys
import types

import pytest
from torch import nn

from pyro_sbp import networks
from pyro_sbp.architectures import ARCHITECTURES, find_architecture
from pyro_sbp.errors import RequestError


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_named_networks_are_those_of_the_package(name):
    architecture = find_architecture(name)
    constructor = architecture.resolve()
    assert constructor is getattr(networks, constructor.__name__)
    kwargs = architecture.kwargs(3, 7)
    assert kwargs["num_classes"] == 7
    assert kwargs.get("in_channels") == 3 or kwargs.get("in_features") == 3 * 28**2


def tiny_model(num_classes: int = 1000, in_chans: int = 3, **kwargs: object) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(in_chans, num_classes))


@pytest.fixture
def timm(monkeypatch):
    """A stand-in with the functions of timm that are used."""
    module = types.ModuleType("timm")
    module.__spec__ = types.SimpleNamespace(name="timm")
    module.is_model = lambda name: name == "tiny_model"
    module.list_models = lambda: ["tiny_model"]
    images = {"input_size": (3, 24, 24), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.1)}
    module.get_pretrained_cfg = lambda name: types.SimpleNamespace(fixed_input_size=True, **images)
    module.model_entrypoint = lambda name: {"tiny_model": tiny_model}[name]
    monkeypatch.setitem(sys.modules, "timm", module)


def test_a_model_of_timm_is_found_by_its_name(timm):
    architecture = find_architecture("timm:tiny_model")
    assert architecture.resolve() is tiny_model
    assert architecture.kwargs(1, 10) == {"num_classes": 10, "in_chans": 1}
    assert architecture.name_to_save() == "test_architectures:tiny_model"


def test_a_model_of_timm_says_what_images_it_expects(timm):
    architecture = find_architecture("timm:tiny_model")
    assert architecture.data_config() == (24, (0.4, 0.5, 0.6), (0.2, 0.3, 0.1), True)
    # A network that takes no other size must be given it.
    assert "img_size" not in architecture.kwargs(3, 10, 24)
    assert architecture.kwargs(3, 10, 32)["img_size"] == 32
    assert find_architecture("lenet5").data_config() is None


def test_an_unknown_model_of_timm_is_refused(timm):
    with pytest.raises(RequestError, match=r"timm has no model 'tiny_mdel'; did you mean 'tiny"):
        find_architecture("timm:tiny_mdel").resolve()


def test_a_model_of_the_real_timm_is_built_and_pruned():
    real = pytest.importorskip("timm")
    architecture = find_architecture("timm:resnet10t")
    net = architecture.resolve()(**architecture.kwargs(1, 10))
    assert net.num_classes == 10 and isinstance(net, real.models.resnet.ResNet)
    with pytest.raises(RequestError, match="did you mean"):
        find_architecture("timm:resnet10tt").resolve()


def test_timm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RequestError, match="needs timm: pip install timm"):
        find_architecture("timm:resnet18")
