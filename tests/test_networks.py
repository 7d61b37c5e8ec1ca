"""The networks of the package: sizes, and that all of their units are found and can be removed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyro_sbp as sbp
from pyro_sbp import networks
from pyro_sbp.gates import GatedNetwork, find_gates, fold, shrink
from pyro_sbp.gates.surgery import remaining_gates, surviving_units
from pyro_sbp.networks import PlaceChannels


def small_resnet(num_classes: int = 10) -> nn.Module:
    """A residual network of the same kind, with few channels."""
    return networks.ResNetCIFAR(2, 3, num_classes, width=4)


def random_theta(gates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theta = {}
    for gate in gates:
        value = 0.5 + torch.rand(gate.size, generator=generator, dtype=torch.float64)
        value[torch.randperm(gate.size, generator=generator)[: gate.size // 3]] = 0
        theta[gate.name] = value
    return theta


@pytest.mark.parametrize(
    ("make", "blocks", "macs"),
    [
        (networks.resnet20, 9, 40_551_040),
        (networks.resnet32, 15, 68_862_592),
        (networks.resnet56, 27, 125_485_696),
        (networks.resnet110, 54, 252_887_680),
    ],
)
def test_residual_networks_have_the_published_macs(make, blocks, macs):
    net = make()
    # 3x3 convolutions of stages at 32, 16 and 8 pixels, whose first block halves the resolution.
    convolution = 9 * 16 * 16 * 32 * 32
    by_arithmetic = 3 * 16 * 9 * 32**2 + 2 * blocks * convolution - 2 * convolution // 2 + 64 * 10
    assert sbp.count_macs(net, torch.zeros(1, 3, 32, 32)) == by_arithmetic == macs
    shortcuts = [module for module in net.modules() if isinstance(module, PlaceChannels)]
    assert len(shortcuts) == 2
    assert not [p for shortcut in shortcuts for p in shortcut.parameters()]


def test_the_residual_streams_are_gated():
    gates = find_gates(networks.resnet20(), torch.zeros(2, 3, 32, 32))
    streams = {gate.name: gate.size for gate in gates if len(gate.writers) > 1}
    assert streams == {"conv1": 16, "layer2.0.conv2": 32, "layer3.0.conv2": 64}
    assert len(gates) == 9 + 3
    assert set(gates.not_prunable) == {"fc"}


def test_the_shortcut_is_that_of_the_paper():
    x = torch.randn(2, 4, 8, 8)
    y = PlaceChannels(4, 8)(x)
    # Every other pixel, and channels of zeros before and after.
    expected = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("seed", range(3))
def test_removing_units_of_a_residual_network_is_exact(seed):
    torch.manual_seed(seed)
    net, x = small_resnet().double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gates = find_gates(net, x)
    theta = random_theta(gates, seed)
    masked = GatedNetwork(net, gates)(x, {name: value[None] for name, value in theta.items()})
    folded = torch.func.functional_call(net, fold(net, gates, theta), (x,))
    small = shrink(net, gates, theta, x)
    assert sbp.relative_difference(masked, folded) <= 1e-10
    assert sbp.relative_difference(masked, small(x)) <= 1e-10
    assert sbp.count_macs(small, x[:1]) < sbp.count_macs(net, x[:1])
    # A second cut goes on from what is left, whose gates need no probing.
    rest = remaining_gates(small, gates, surviving_units(gates, theta))
    again = random_theta(rest, seed + 1)
    masked = GatedNetwork(small, rest)(x, {name: value[None] for name, value in again.items()})
    assert sbp.relative_difference(masked, shrink(small, rest, again, x)(x)) <= 1e-10


def test_a_pruned_residual_network_is_saved_and_exported(tmp_path):
    size = {"blocks": 1, "width": 4}
    net, x = networks.ResNetCIFAR(**size).eval(), torch.randn(2, 3, 32, 32)
    gates = find_gates(net, x)
    small = shrink(net, gates, {n: t.float() for n, t in random_theta(gates).items()}, x).eval()
    sbp.save(small, tmp_path / "net", networks.ResNetCIFAR, size)
    loaded = sbp.load(tmp_path / "net")
    assert torch.equal(loaded(x), small(x))
    for format in ("pt2", "onnx"):
        assert sbp.export(small, tmp_path / f"net.{format}", (3, 32, 32), format) < 1e-4


def test_a_pruned_resnet20_is_saved(tmp_path):
    net, x = networks.resnet20(width=4).eval(), torch.randn(2, 3, 32, 32)
    gates = find_gates(net, x)
    small = shrink(net, gates, {n: t.float() for n, t in random_theta(gates).items()}, x).eval()
    sbp.save(small, tmp_path / "net", networks.resnet20, {"width": 4})
    assert torch.equal(sbp.load(tmp_path / "net")(x), small(x))


def test_a_shortcut_that_names_a_channel_that_is_not_there_is_refused(tmp_path):
    net = networks.resnet20()
    shortcut = net.get_submodule("layer2.0.shortcut")
    assert isinstance(shortcut, PlaceChannels)
    shortcut.source[0] = 17
    with pytest.raises(
        ValueError, match=r"layer2.0.shortcut.source.* that the input does not have"
    ):
        sbp.save(net, tmp_path / "net", networks.resnet20)
