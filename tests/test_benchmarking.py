"""MACs against the arithmetic and against ptflops; latency of what is asked for."""

import logging

import pytest
import torch
from ptflops import get_model_complexity_info

from pyro_sbp import networks
from pyro_sbp.benchmarking import (
    benchmark,
    costs_by_layer,
    count_macs,
    count_parameters,
    one_unit_network,
)
from pyro_sbp.probing import find_gates


def vgg_macs():
    macs, channels, size = 0, 3, 32
    for block in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for width in block:
            macs += 9 * channels * width * size**2
            channels = width
        size //= 2
    return macs + 512 * 512 + 512 * 10


NETS = [
    (networks.LeNet500_300, (1, 28, 28), 784 * 500 + 500 * 300 + 300 * 10),
    (networks.LeNet300_100, (1, 28, 28), 784 * 300 + 300 * 100 + 100 * 10),
    (networks.LeNet5, (1, 28, 28), 24**2 * 25 * 20 + 8**2 * 25 * 20 * 50 + 800 * 500 + 500 * 10),
    (networks.VGGLike, (3, 32, 32), vgg_macs()),
]


@pytest.mark.parametrize(("make", "shape", "expected"), NETS)
def test_macs_are_the_arithmetic_and_agree_with_ptflops(make, shape, expected):
    net = make()
    assert count_macs(net, torch.zeros(1, *shape)) == expected
    counted, _ = get_model_complexity_info(
        net, shape, as_strings=False, print_per_layer_stat=False, backend="aten", verbose=False
    )
    assert counted == pytest.approx(expected, rel=0.015)


def test_vgg_like_has_the_published_size():
    net = networks.VGGLike()
    assert count_macs(net, torch.zeros(1, 3, 32, 32)) == pytest.approx(313.5e6, rel=1e-3)
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert weights == pytest.approx(14.98e6, rel=1e-3)


def test_counting_leaves_the_mode_alone():
    net = networks.VGGLike().train()
    mean = net.bn1.running_mean.clone()
    count_macs(net, torch.randn(1, 3, 32, 32))
    assert all(module.training for module in net.modules())
    assert torch.equal(net.bn1.running_mean, mean)


def test_the_floor_has_one_unit_in_every_gate():
    net, x = networks.LeNet5(), torch.rand(2, 1, 28, 28)
    floor = one_unit_network(net, find_gates(net, x, ["fc1"]), x)
    assert (floor.conv1.out_channels, floor.conv2.out_channels) == (1, 1)
    assert count_parameters(floor) == (25 + 1) + (25 + 1) + (1 + 1) + (10 + 10)


def test_benchmark_reports_every_setting():
    net, x = networks.LeNet300_100(), torch.rand(3, 1, 28, 28)
    floor = one_unit_network(net, find_gates(net, x, ["fc1"]), x)
    result = benchmark(
        net, floor, x, floor=floor, batch_sizes=(2, 7), threads=(1,), devices=("cpu",), seconds=0.02
    )
    assert [(r.batch_size, r.threads) for r in result.latencies] == [(2, 1), (7, 1)]
    assert result.macs_ratio == (784 * 300 + 300 * 100 + 1000) / (1 + 1 + 10)
    for row in result.latencies:
        assert row.speedup == row.dense_ms / row.pruned_ms > 0
        assert row.device.startswith("cpu: ") and row.spread >= 0


def test_only_the_line_about_cuda_home_is_silenced():
    logger, handler = logging.getLogger("torch.utils.cpp_extension"), Lines()
    logger.addHandler(handler)
    net, x = networks.LeNet300_100(), torch.rand(1, 1, 28, 28)
    benchmark(net, net, x, batch_sizes=(1,), devices=("cpu",), seconds=0.01)
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
    logger.warning("another")
    logger.removeHandler(handler)
    assert handler.lines == ["another"]


class Lines(logging.Handler):
    """What is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class Gram(torch.nn.Module):
    """A layer, and a product and a parameter that belong to none."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 4)
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        y = self.layer(x)
        return self.scale[0] * y @ y.T


def test_costs_by_layer():
    costs = costs_by_layer(networks.LeNet5(), torch.rand(1, 1, 28, 28))
    assert costs == {
        "conv1": (24**2 * 25 * 20, 25 * 20 + 20),
        "conv2": (8**2 * 25 * 20 * 50, 25 * 20 * 50 + 50),
        "fc1": (800 * 500, 800 * 500 + 500),
        "fc2": (500 * 10, 500 * 10 + 10),
    }
    costs = costs_by_layer(Gram(), torch.rand(5, 6))
    assert costs == {"layer": (5 * 6 * 4, 28), "": (5 * 4 * 5, 3)}
