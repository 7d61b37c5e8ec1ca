"""benchmark and export of networks with inputs of every kind."""

import dataclasses
from collections import UserDict

import pytest
import torch
from torch import Tensor, nn

import pyro_sbp as sbp
from pyro_sbp.deployment.batches import batch_size, named_tensors, with_batch_size
from pyro_sbp.errors import RequestError


class Encoding(UserDict):
    """A mapping that is no dict, as a tokenizer gives."""


@dataclasses.dataclass
class Pair:
    x: Tensor
    y: Tensor
    scale: float = 1.0


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, y):
        return self.c((self.a(x) + self.b(y)).relu())


class OfPair(Two):
    def forward(self, pair):
        return super().forward(pair.x, pair.y) * pair.scale


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.b, self.c = nn.Embedding(20, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None):
        h = self.b(self.e(input_ids)).relu()
        if attention_mask is not None:
            h = h * attention_mask[..., None]
        return {"logits": self.c(h.mean(1)), "all": self.c(h)}


IDS, MASK = torch.arange(10).view(2, 5), torch.ones(2, 5)
X, Y = torch.linspace(-1, 1, 8).view(2, 4), torch.linspace(1, 2, 10).view(2, 5)
CASES = {
    "two tensors": (Two, (X, Y)),
    "dataclass": (OfPair, Pair(X, Y, 2.0)),
    "tokens": (Tokens, IDS),
    "mapping": (Tokens, Encoding(input_ids=IDS, attention_mask=MASK)),
    "dict": (Tokens, {"input_ids": IDS, "attention_mask": None}),
}


def test_batches_of_every_kind():
    pair = with_batch_size(Pair(X, Y, 2.0), 5)
    assert batch_size(pair) == 5 and torch.equal(pair.y, Y[[0, 1, 0, 1, 0]]) and pair.scale == 2
    places = torch.arange(7)
    one = with_batch_size((X, places), 1)
    assert one[0].shape == (1, 4) and torch.equal(one[1], places)
    images = [torch.rand(3, 8, 8), torch.rand(3, 6, 6)]
    assert [len(with_batch_size(images, n)) for n in (1, 5)] == [1, 5] and batch_size(images) == 2
    with pytest.raises(RequestError, match="no tensor with examples"):
        batch_size({"a": 1})
    assert list(named_tensors(Two(), (X, Y))) == ["x", "y"]
    assert list(named_tensors(OfPair(), (Pair(X, Y),))) == ["pair_0", "pair_1"]


def pruned(case):
    torch.manual_seed(0)
    make, x = CASES[case]
    net = make()
    gates = sbp.find_gates(net, x)
    theta = {gate.name: (torch.arange(gate.size) % 3 > 0).float() for gate in gates}
    return net, sbp.shrink(net, gates, theta, x), x


@pytest.mark.parametrize("case", CASES)
def test_benchmark_and_pt2(case, tmp_path):
    net, small, x = pruned(case)
    found = sbp.benchmark(net, small, x, batch_sizes=(1, 3), seconds=0.01)
    assert [latency.batch_size for latency in found.latencies] == [1, 3]
    assert found.macs_ratio > 1
    assert sbp.export(small, tmp_path / "net.pt2", x, "pt2") <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime(case, tmp_path):
    import onnxruntime

    net, small, x = pruned(case)
    found = sbp.benchmark(
        net, small, x, batch_sizes=(3,), seconds=0.01, runtimes=("eager", "onnxruntime")
    )
    assert [latency.runtime for latency in found.latencies] == ["eager", "onnxruntime"]
    assert sbp.export(small, tmp_path / "net.onnx", x, "onnx") <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert {item.name for item in session.get_inputs()} == set(named_tensors(small, x))
