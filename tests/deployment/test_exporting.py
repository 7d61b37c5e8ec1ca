"""export: programs that compute what the network computes, on any batch size."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pyro_sbp import networks
from pyro_sbp.deployment import exporting
from pyro_sbp.deployment.exporting import FORMATS, ExportError, export
from pyro_sbp.errors import RequestError
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import shrink


def pruned(make, *shape, features=()):
    torch.manual_seed(0)
    net = make().eval()
    x = torch.rand(2, *shape)
    gates = find_gates(net, x, features)
    theta = {gate.name: torch.rand(gate.size) * (torch.rand(gate.size) > 0.4) for gate in gates}
    return shrink(net, gates, theta, x)


def mobilenet_v2():
    from torchvision.models import MobileNetV2

    # One of its seventeen blocks: it expands, and has a convolution per channel.
    return MobileNetV2(num_classes=10, inverted_residual_setting=[[6, 16, 1, 2]])


def resnet18():
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("make", "shape", "features"),
    [
        (networks.LeNet5, (1, 28, 28), ["fc1"]),
        pytest.param(networks.VGGLike, (3, 32, 32), (), marks=pytest.mark.slow),
        pytest.param(resnet18, (3, 32, 32), (), marks=pytest.mark.slow),
        (mobilenet_v2, (3, 32, 32), ()),
    ],
    ids=["lenet5", "vgg-like", "resnet18", "mobilenet_v2"],
)
def test_the_program_agrees_with_the_network(make, shape, features, format, tmp_path):
    if format == "executorch":
        pytest.importorskip("executorch.runtime")
    net = pruned(make, *shape, features=features)
    path = tmp_path / f"net.{format}"
    assert export(net, path, shape, format) <= 1e-5
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_pt2_file_needs_torch_only(tmp_path):
    net = pruned(networks.LeNet5, 1, 28, 28, features=["fc1"])
    export(net, tmp_path / "net.pt2", (1, 28, 28), "pt2")
    x = torch.rand(3, 1, 28, 28)
    torch.save((x, net(x).detach()), tmp_path / "io.pt")
    program = (
        "import sys; sys.modules['pyro'] = sys.modules['pyro_sbp'] = None\n"
        "import torch\n"
        "x, y = torch.load('io.pt')\n"
        "assert torch.allclose(torch.export.load('net.pt2').module()(x), y, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_wrong_requests_write_nothing(tmp_path):
    net = nn.Linear(3, 2)
    with pytest.raises(RequestError, match="unknown format 'tflite'; expected onnx, pt2, "):
        export(net, tmp_path / "a", (3,), "tflite")
    for target in (tmp_path / "no" / "where.pt2", tmp_path):
        with pytest.raises(RequestError, match="cannot write"):
            export(net, target, (3,), "pt2")
    assert list(tmp_path.iterdir()) == []


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Untraceable(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def test_a_program_that_differs_is_not_left_behind(tmp_path):
    for net, words in ((Noisy(), "differs from the network by"), (Untraceable(), "cannot trace")):
        with pytest.raises(ExportError, match=words):
            export(net, tmp_path / "net.pt2", (3,), "pt2")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(4,), (-3,), ("three",), (2.5,), (10**30,), (3, None), "ab"])
def test_inputs_that_the_network_does_not_take_are_refused_in_one_line(shape, tmp_path):
    with pytest.raises(RequestError, match="does not accept inputs of shape") as found:
        export(nn.Linear(3, 2), tmp_path / "net.pt2", shape, "pt2")
    assert len(str(found.value).splitlines()) == 1 and list(tmp_path.iterdir()) == []


class Indexed(nn.Module):
    """A network with a parameter that is no floating-point number, before one that is."""

    def __init__(self):
        super().__init__()
        self.order = nn.Parameter(torch.tensor([1, 0, 2]), requires_grad=False)
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x[:, self.order])


def test_inputs_have_the_type_of_the_weights(tmp_path):
    assert export(Indexed(), tmp_path / "net.pt2", (3,), "pt2") <= 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_an_older_program_stays_if_the_disk_is_full(format, tmp_path, monkeypatch):
    if format == "executorch":
        pytest.importorskip("executorch.runtime")
    net, path = nn.Linear(3, 2), tmp_path / f"net.{format}"
    export(net, path, (3,), format)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError, match=r"cannot write .*: No space left on device"):
        export(nn.Linear(3, 2), path, (3,), format)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_program_of_several_files_is_refused(tmp_path, monkeypatch):
    """A file beside the program would be looked for under the name of a temporary file."""
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(
        torch.onnx.ONNXProgram, "save", lambda self, path: save(self, path, external_data=True)
    )
    with pytest.raises(ExportError, match="too large for an ONNX file, whose limit is 2 GB"):
        export(nn.Linear(300, 200), tmp_path / "net.onnx", (300,), "onnx")
    assert list(tmp_path.iterdir()) == []


def test_executorch_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'pyro-sbp\[executorch\]'"):
        export(nn.Linear(3, 2), tmp_path / "net.pte", (3,), "executorch")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_executorch_program_runs_without_torch_export(tmp_path):
    """The runtime alone reads the file, takes its tensors by position, and has a batch limit."""
    runtime = pytest.importorskip("executorch.runtime")

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, scale):
            return self.linear(x) * scale, x.sum(1)

    net, path = Two(), tmp_path / "net.pte"
    x, scale = torch.randn(4, 3), torch.rand(4, 1)
    export(net, path, {"x": x, "scale": scale}, "executorch")
    method = runtime.Runtime.get().load_program(path).load_method("forward")
    with torch.no_grad():
        expected = net(x, scale)
    for found, value in zip(method.execute([x, scale]), expected, strict=True):
        torch.testing.assert_close(found, value)
    largest = torch.rand(exporting.LARGEST_BATCH, 3), torch.rand(exporting.LARGEST_BATCH, 1)
    torch.testing.assert_close(method.execute(list(largest))[1], largest[0].sum(1))
    with pytest.raises(RuntimeError):
        method.execute([torch.rand(exporting.LARGEST_BATCH + 1, 3), torch.rand(17, 1)])
