"""MACs against the arithmetic and against ptflops; latency of what is asked for."""

import logging
import os

import pytest
import torch
from ptflops import get_model_complexity_info
from torch._inductor import cpp_builder

from pyro_sbp import networks
from pyro_sbp.deployment import exporting
from pyro_sbp.deployment.benchmarking import benchmark, one_unit_network
from pyro_sbp.deployment.exporting import ExportError
from pyro_sbp.deployment.runtimes import prepare
from pyro_sbp.errors import RequestError
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.pruning.macs import costs_by_layer, count_macs, count_parameters


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


@pytest.fixture
def compiler(monkeypatch):
    """As on a machine that has a C++ compiler, for tests that compile nothing."""
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")


def in_runtimes(*runtimes, net=None, shape=(1, 28, 28), **kwargs):
    net, x = net or networks.LeNet300_100(), torch.rand(3, *shape)
    kwargs = {"batch_sizes": (1, 4), "devices": ("cpu",), "seconds": 0.01, **kwargs}
    result = benchmark(net, net, x, runtimes=runtimes, **kwargs)
    return [(r.batch_size, r.threads, r.runtime) for r in result.latencies]


def test_each_setting_is_measured_in_each_runtime():
    before = torch.get_num_threads()
    rows = in_runtimes("eager", "onnxruntime", threads=(1, 2))
    settings = [(size, threads) for size in (1, 4) for threads in (1, 2)]
    assert rows == [(*s, runtime) for s in settings for runtime in ("eager", "onnxruntime")]
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not os.environ.get("PYRO_SBP_INDUCTOR"), reason="half a minute a network")
def test_compile_measures_more_settings_than_a_forward_has_room_for():
    sizes = (1, 2, 3, 4, 5)
    assert in_runtimes("compile", batch_sizes=sizes) == [(n, 1, "compile") for n in sizes]


class Branching(torch.nn.Module):
    """Decides by its input, as no program of one graph can."""

    def forward(self, x):
        return x @ torch.eye(6) if float(x.sum()) > 0 else -x


class Several(torch.nn.Linear):
    """Gives more than one tensor."""

    def forward(self, x):
        return {"y": super().forward(x)}


@pytest.mark.parametrize("runtime", ["compile", "onnxruntime"])
def test_what_a_runtime_cannot_run_is_refused(runtime, compiler):
    for net, words in (
        (Branching(), "torch.(compile|onnx) cannot (compile|trace) the network"),
        (Several(6, 4), "the network gives a dict; expected one tensor"),
    ):
        with pytest.raises(ExportError, match=words) as refused:
            in_runtimes(runtime, net=net, shape=(6,))
        assert "\n" not in str(refused.value)


def test_other_outputs_than_eager_s_are_refused(monkeypatch, compiler):
    net = networks.LeNet300_100()
    for factor, words in ((1 + 1e-3, "differs from eager by 1.0e-03"), (float("nan"), "by nan")):
        monkeypatch.setattr(torch, "compile", lambda net, f=factor, **_: lambda x: f * net(x))
        with pytest.raises(ExportError, match=words):
            in_runtimes("compile", net=net)


def test_programs_start_with_the_threads_they_are_measured_with(monkeypatch, compiler):
    seen = []
    monkeypatch.setattr(
        torch, "compile", lambda net, **_: seen.append(torch.get_num_threads()) or net
    )
    in_runtimes("compile", batch_sizes=(1,), threads=(1, 2))
    assert seen == [1, 1, 2, 2]


def test_onnxruntime_reads_the_input_where_it_lies_with_the_threads_asked_for(monkeypatch):
    import onnxruntime

    net, x, options = networks.LeNet300_100().eval(), torch.rand(5, 1, 28, 28), []
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *a, **k: options.append(a[1:]) or session(*a, **k)
    )
    with torch.inference_mode():
        call = prepare(net, "onnxruntime", (1, 28, 28))(x, 2)
        assert options[-1][0].intra_op_num_threads == 2
        torch.testing.assert_close(call(), net(x))
        x.copy_(torch.rand_like(x))
        torch.testing.assert_close(call(), net(x))


def test_runtimes_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(RequestError, match="expected eager, compile or onnxruntime; did you mean"):
        in_runtimes("onnxruntim")
    with pytest.raises(RequestError, match="on the CPU only: add 'cpu' to the devices"):
        in_runtimes("onnxruntime", devices=("cuda",))
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxruntime" else 1)
    with pytest.raises(RequestError, match=r"pip install 'pyro-sbp\[export\]'"):
        in_runtimes("onnxruntime")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/none/g++",))
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(RequestError, match=r"needs a C\+\+ compiler: install g\+\+, or name"):
        in_runtimes("compile")


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
