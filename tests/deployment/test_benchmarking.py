"""benchmark: what is measured, in which runtimes, and what is refused."""

import json
import logging
import os

import pytest
import torch
from torch._inductor import cpp_builder

from pyro_sbp import networks
from pyro_sbp.deployment import benchmarking, exporting
from pyro_sbp.deployment.benchmarking import benchmark, floor_network, one_unit_network
from pyro_sbp.deployment.exporting import ExportError
from pyro_sbp.deployment.runtimes import prepare
from pyro_sbp.errors import RequestError
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.pruning.macs import count_parameters


def test_the_floor_has_one_unit_in_every_gate():
    net, x = networks.LeNet5(), torch.rand(2, 1, 28, 28)
    floor = one_unit_network(net, find_gates(net, x, ["fc1"]), x)
    assert (floor.conv1.out_channels, floor.conv2.out_channels) == (1, 1)
    assert count_parameters(floor) == (25 + 1) + (25 + 1) + (1 + 1) + (10 + 10)


def test_the_floor_has_one_head_in_every_attention():
    net = torch.nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    floor = floor_network(net, torch.rand(2, 5, 12))
    assert isinstance(net.self_attn, torch.nn.MultiheadAttention)
    assert (floor.self_attn.query.out_features, floor.self_attn.out.in_features) == (4, 4)
    assert (floor.linear1.out_features, floor.linear2.in_features) == (1, 1)


def test_benchmark_reports_every_setting():
    net, x = networks.LeNet300_100(), torch.rand(3, 1, 28, 28)
    floor = one_unit_network(net, find_gates(net, x, ["fc1"]), x)
    result = benchmark(
        net, floor, x, floor=floor, batch_sizes=(2, 7), threads=(1,), devices=("cpu",), seconds=0.02
    )
    assert [(r.batch_size, r.threads) for r in result.latencies] == [(2, 1), (7, 1)]
    assert result.macs_ratio == (784 * 300 + 300 * 100 + 1000) / (1 + 1 + 10)
    found = result.to_dict()
    assert found["dense_check"]["ptflops"] == 785 * 300 + 301 * 100 + 101 * 10
    assert found["pruned_check"]["macs"] == found["pruned_macs"] == 1 + 1 + 10
    json.dumps(found)
    for row in result.latencies:
        assert 0 < row.speedup_low <= row.speedup <= row.speedup_high
        assert row.blocks >= 6 and row.confidence == 0.95
        assert row.device.startswith("cpu: ") and row.spread >= 0


def test_speedup_and_interval_are_those_of_the_ratios_of_blocks(monkeypatch):
    net, x = networks.LeNet300_100(), torch.rand(1, 1, 28, 28)
    # The load doubles in every round. The ratios, in ascending order, are 2, 2.5, 3, 3.5, 4, 4.5,
    # 5, 5.5 and 6. Of nine values, the second and the eighth enclose the median with 96.1 %.
    ratios = [4.0, 2.0, 6.0, 3.5, 2.5, 5.5, 3.0, 5.0, 4.5]
    pruned = [1e-3 * 2**place for place in range(9)]
    dense = [ratio * time for ratio, time in zip(ratios, pruned, strict=True)]
    times = {"dense": dense, "pruned": pruned}
    monkeypatch.setattr(benchmarking, "times_in_turn", lambda *_: times)
    (row,) = benchmark(net, net, x, batch_sizes=(1,), devices=("cpu",)).latencies
    assert (row.speedup, row.speedup_low, row.speedup_high) == pytest.approx((4.0, 2.5, 5.5))
    assert (row.pruned_ms, row.dense_ms) == pytest.approx((16.0, 40.0))
    assert row.blocks == 9 and row.interval == "2.50 to 5.50"


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


@pytest.mark.parametrize("runtime", ["compile", "onnxruntime"])
def test_what_a_runtime_cannot_run_is_refused(runtime, compiler):
    words = "torch.(compile|onnx) cannot (compile|trace) the network"
    with pytest.raises(ExportError, match=words) as refused:
        in_runtimes(runtime, net=Branching(), shape=(6,))
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
    with pytest.raises(RequestError, match=r"did you mean .* expected eager, compile, onnxruntime"):
        in_runtimes("onnxruntim")
    with pytest.raises(RequestError, match="on the CPU only: add 'cpu' to the devices"):
        in_runtimes("onnxruntime", devices=("cuda",))
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxruntime" else 1)
    with pytest.raises(RequestError, match=r"pip install 'pyro-sbp\[export\]'"):
        in_runtimes("onnxruntime")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/none/g++",))
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(RequestError, match=r"needs a C\+\+ compiler: install g\+\+, or set CXX"):
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
