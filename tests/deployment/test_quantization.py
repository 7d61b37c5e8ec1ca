"""Networks in 8-bit integers in ONNX Runtime."""

import pytest
import torch
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.deployment import quantization
from pyro_sbp.deployment.exporting import ExportError
from pyro_sbp.deployment.memory import file_size
from pyro_sbp.errors import RequestError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 25, 100),
        nn.ReLU(), nn.Linear(100, 10),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(16, 1, 12, 12, generator=generator) for _ in range(4)]


def test_the_program_is_small_and_close_to_the_network(net, batches):
    program = quantization.quantize(net, batches)
    assert len(program) < file_size(net) / 2  # the graph is not quantized
    others = [torch.rand(5, 1, 12, 12), torch.rand(1, 1, 12, 12)]  # of other batch sizes
    for x, (found,) in zip(others, quantization.outputs_of(program, net, others), strict=True):
        expected = net(x).detach()
        assert found.shape == expected.shape
        assert float((found - expected).norm() / expected.norm()) < quantization.TOLERANCE


def test_a_network_that_is_too_inexact_is_refused(net, batches, monkeypatch):
    monkeypatch.setattr(quantization, "TOLERANCE", 1e-6)
    with pytest.raises(ExportError, match=r"in int8 differs by .* of its outputs from float32"):
        quantization.quantize(net, batches)


def test_int8_is_measured_beside_eager(net, batches):
    options = {"batch_sizes": (2,), "devices": ("cpu",), "seconds": 0.01}
    result = sbp.benchmark(
        net, net, batches[0], runtimes=("eager", "int8"), calibration=batches, **options
    )
    assert [latency.runtime for latency in result.latencies] == ["eager", "int8"]
    assert all(latency.pruned_ms > 0 for latency in result.latencies)
    with pytest.raises(RequestError, match="int8 needs batches of training inputs"):
        sbp.benchmark(net, net, batches[0], runtimes=("int8",), **options)


def test_a_missing_package_is_named(net, batches, monkeypatch):
    from pyro_sbp.deployment import exporting

    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'pyro-sbp\[export\]'"):
        quantization.quantize(net, batches)
