"""Networks of several families: cut, loaded in a fresh process, and exported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pyro_sbp as sbp
from pyro_sbp.deployment.exporting import export
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.nested import tensors_of

TINY = {"vocab_size": 50, "num_hidden_layers": 2, "intermediate_size": 48, "hidden_size": 32}


class Case(NamedTuple):
    """A network, its input, its constructor and arguments, and the sizes of some of its gates."""

    net: nn.Module
    x: Any
    constructor: Callable[..., nn.Module]
    kwargs: dict[str, Any]
    sizes: dict[str, int]


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x).relu())


class C2f(nn.Module):
    """The block of YOLOv8: two halves of the channels, a chain of bottlenecks on the second."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, padding=1)
        self.cv1, self.norm = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        self.m = nn.ModuleList([Bottleneck(width // 2)])
        self.cv2, self.head = nn.Conv2d(width // 2 * 3, width, 1), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.norm(self.cv1(self.stem(x).relu())).relu().chunk(2, 1))
        parts += [block(parts[-1]) for block in self.m]
        return self.head(self.cv2(torch.cat(parts, 1)).relu())


class Recurrent(nn.Module):
    """A classifier of sequences of tokens."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm, self.head = nn.LSTM(8, hidden, 2, batch_first=True), nn.Linear(hidden, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


def c2f() -> Case:
    x = torch.rand(2, 3, 12, 12)
    return Case(C2f(), x, C2f, {}, {"stem": 16, "cv1": 8, "m.0.cv1": 8, "cv2": 16})


def lstm() -> Case:
    sizes = {"embedding": 8, "lstm": 12}
    return Case(Recurrent(), torch.randint(20, (2, 7)), Recurrent, {}, sizes)


def bert() -> Case:
    transformers = pytest.importorskip("transformers")
    net = transformers.BertModel(transformers.BertConfig(**TINY, num_attention_heads=4))
    sizes = {f"encoder.layer.{n}.attention.self.query": 4 for n in range(2)}
    return Case(net, {"input_ids": torch.randint(50, (2, 7))}, type(net), {}, sizes)


def llama() -> Case:
    transformers = pytest.importorskip("transformers")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "use_cache": False}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **heads))
    sizes = {f"model.layers.{n}.self_attn.q_proj": 4 for n in range(2)}
    return Case(net, {"input_ids": torch.randint(50, (2, 7))}, type(net), {}, sizes)


def vit() -> Case:
    timm = pytest.importorskip("timm")
    kwargs = {"img_size": 32, "depth": 2, "num_heads": 4, "embed_dim": 32, "num_classes": 5}
    sizes = {f"blocks.{n}.attn.qkv": 4 for n in range(2)}
    make = timm.models.vit_tiny_patch16_224
    return Case(make(**kwargs), torch.rand(2, 3, 32, 32), make, kwargs, sizes)


FAMILIES = {"c2f": c2f, "lstm": lstm, "bert": bert, "llama": llama, "vit": vit}
PROGRAM = """
import sys
import torch
sys.path.insert(0, {tests!r})
import pyro_sbp as sbp
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.nested import tensors_of
torch.set_num_threads({threads})
known = {{}}
if {own!r}:
    import test_deployed_families
    known["constructor"] = getattr(test_deployed_families, {own!r})
saved = torch.load({saved!r}, weights_only=True)
with torch.no_grad():
    out = list(tensors_of(call(sbp.load({directory!r}, **known), saved["x"])))
assert len(out) == len(saved["out"])
assert all(map(torch.equal, out, saved["out"]))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_network_is_loaded_in_a_fresh_process_and_exported(family, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net, x, constructor, kwargs, sizes = FAMILIES[family]()
    net.eval()
    gates = sbp.find_gates(net, x)
    found = {gate.name: gate.size for gate in gates}
    assert sizes.items() <= found.items(), (found, gates.not_prunable)
    theta = {gate.name: 0.5 + torch.rand(gate.size) for gate in gates}
    for gate in gates:
        # Different units of every gate, and different numbers of them in the two blocks.
        theta[gate.name][torch.randperm(gate.size)[: 1 + len(gate.name) % 2]] = 0
    small = sbp.shrink(net, gates, theta, x).eval()
    assert sbp.count_macs(small, x) < sbp.count_macs(net, x)
    sbp.save(small, tmp_path / "net", constructor, kwargs)
    with torch.no_grad():
        out = [tensor.clone() for tensor in tensors_of(call(small, x))]
    torch.save({"x": x, "out": out}, tmp_path / "saved.pt")
    program = PROGRAM.format(
        tests=str(Path(__file__).parent),
        threads=torch.get_num_threads(),
        own=constructor.__name__ if constructor.__module__ == __name__ else "",
        saved=str(tmp_path / "saved.pt"),
        directory=str(tmp_path / "net"),
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    for format in ("onnx", "pt2"):
        assert export(small, tmp_path / f"net.{format}", x, format) <= 1e-5
