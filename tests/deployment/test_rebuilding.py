"""A network with the sizes and the tensors that a file describes."""

import pytest
import torch
from torch import nn

from pyro_sbp.deployment import rebuilding
from pyro_sbp.deployment.description import Description
from pyro_sbp.deployment.rebuilding import (
    check_fit,
    construct,
    fill,
    non_persistent_buffers,
    resize_layers,
)
from pyro_sbp.gates.layers import Select


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.last(self.norm(self.first(x))) * self.mask


LAYERS = {
    "first": {"select": 5, "in_features": 5, "out_features": 3},
    "norm": {"num_features": 3},
    "last": {"in_features": 3},
}


def described(**others):
    return Description("test_rebuilding:Net", {}, layers=LAYERS, buffers=("mask",), **others)


@pytest.fixture
def state():
    """The tensors of a smaller network."""
    torch.manual_seed(0)
    return {
        "first.select.index": torch.tensor([0, 1, 2, 4, 5]),
        "first.layer.weight": torch.randn(3, 5),
        "first.layer.bias": torch.randn(3),
        **{f"norm.{name}": torch.rand(3) for name in ("weight", "bias", "running_mean")},
        "norm.running_var": torch.rand(3),
        "norm.num_batches_tracked": torch.tensor(7),
        "last.weight": torch.randn(2, 3),
        "last.bias": torch.randn(2),
        "mask": torch.tensor([1.0, 0.0]),
    }


def rebuilt(state, description):
    net = construct(Net, {}, separate=False)
    shapes = resize_layers(net, description, state)
    check_fit(net, description, state, shapes)
    fill(net, description, state)
    return net.eval()


def test_the_network_computes_what_its_tensors_say(state):
    net, x = rebuilt(state, described()), torch.randn(4, 6)
    hidden = x[:, [0, 1, 2, 4, 5]] @ state["first.layer.weight"].T + state["first.layer.bias"]
    deviation = (state["norm.running_var"] + 1e-5).sqrt()
    hidden = (hidden - state["norm.running_mean"]) / deviation
    hidden = hidden * state["norm.weight"] + state["norm.bias"]
    expected = (hidden @ state["last.weight"].T + state["last.bias"]) * state["mask"]
    torch.testing.assert_close(net(x), expected)
    assert isinstance(net.first.select, Select) and net.first.layer.in_features == 5
    assert set(non_persistent_buffers(net)) == {"mask"}


def test_tied_and_frozen_parameters_are_so_again(state):
    state["last.weight"] = state["first.layer.weight"][:2, :3].clone()
    state["norm.bias"] = state["norm.weight"]
    net = rebuilt(state, described(same={"norm.bias": "norm.weight"}, frozen=("last.bias",)))
    assert net.norm.bias is net.norm.weight
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ["last.bias"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("last.bias", None, "the tensor 'last.bias' is missing"),
        ("other", torch.zeros(1), "the tensor 'other' belongs to no layer"),
        ("last.weight", torch.zeros(2, 4), r"'last.weight' has shape \[2, 4\], not \[2, 3\]"),
        ("norm.bias", torch.zeros(3).int(), "'norm.bias' has the type torch.int32, not"),
        (
            "first.select.index",
            torch.arange(4),
            "selects 5 features, but has no valid index for them",
        ),
        ("first.select.index", torch.arange(5) + 2, "not among its 6"),
    ],
)
def test_tensors_that_do_not_fit_are_named(state, name, value, words):
    state = {k: v for k, v in {**state, name: value}.items() if v is not None}
    with pytest.raises(ValueError, match=words):
        rebuilt(state, described())


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"second": {"in_features": 3}}, "there is no layer 'second'"),
        ({"norm": {"in_features": 3}}, "layer 'norm' has no in_features"),
    ],
)
def test_layers_that_are_not_there_are_named(state, layers, words):
    with pytest.raises(ValueError, match=words):
        resize_layers(Net(), Description("test_rebuilding:Net", {}, layers=layers), state)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.num_heads, self.head_dim, self.parts, self.fast = 3, 4, (12, 12, 12), True

    def forward(self, x):
        parts = self.qkv(x).split(self.parts, -1)
        q, k, v = (p.view(*x.shape[:2], self.num_heads, self.head_dim).mT for p in parts)
        return self.proj((q @ k.mT @ v).mT.flatten(2))


def attention_of(**sizes):
    layers = {"attn.qkv": {"out_features": 24}, "attn.proj": {"in_features": 8}}
    net = nn.ModuleDict({"attn": Attention(), "other": Attention()})
    resize_layers(net, Description("a:B", {}, layers=layers, sizes={"attn": sizes}), {})
    return net["attn"]


def test_sizes_written_into_modules_are_set():
    attention = attention_of(num_heads=2, parts=[8, 8, 8])
    assert (attention.num_heads, attention.parts, attention.head_dim) == (2, (8, 8, 8), 4)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"heads": 2}, "'heads' of 'attn' is not a size of a module around a resized layer"),
        ({"fast": 0}, "'fast' of 'attn' is not a size"),
        ({"training": 0}, "'training' of 'attn' is not a size"),
        ({"_version": 1}, "'_version' of 'attn' is not a size"),
        ({"forward": 1}, "'forward' of 'attn' is not a size"),
        ({"num_heads": 4}, "'num_heads' of 'attn' is 4, which does not follow from 3"),
        ({"num_heads": 1}, "'num_heads' of 'attn' is 1, which does not follow from 3"),
        ({"num_heads": 0}, "'num_heads' of 'attn' is 0, which does not follow"),
        ({"num_heads": [2]}, r"'num_heads' of 'attn' is \[2\], which does not follow"),
        ({"parts": [8, 8]}, "'parts' of 'attn' is .*, which does not follow"),
        ({"parts": [8, 8, 13]}, "'parts' of 'attn' is .*, which does not follow"),
        ({"parts": 8}, "'parts' of 'attn' is 8, which does not follow"),
    ],
)
def test_other_attributes_are_not_set(sizes, words):
    with pytest.raises(ValueError, match=words):
        attention_of(**sizes)


@pytest.mark.parametrize("module", ["other", "attn.qkv", "nothing"])
def test_sizes_are_set_around_resized_layers_only(module):
    net = nn.ModuleDict({"attn": Attention(), "other": Attention()})
    layers = {"attn.qkv": {"out_features": 24}}
    sizes = {module: {"num_heads": 2}}
    with pytest.raises(ValueError, match="is not a size of a module around a resized layer"):
        resize_layers(net, Description("a:B", {}, layers=layers, sizes=sizes), {})


def test_channels_have_to_fall_into_groups():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    layers = {"0": {"in_channels": 3}}
    with pytest.raises(
        ValueError, match="the channels of layer '0' cannot be divided into 2 groups"
    ):
        resize_layers(net, Description("a:B", {}, layers=layers), {})


def test_what_a_constructor_must_not_do(monkeypatch):
    with pytest.raises(TypeError, match="the constructor builds a dict, which is not a network"):
        construct(dict, {}, separate=False)
    monkeypatch.setattr(rebuilding, "available_memory", lambda device: 2**26)
    assert construct(nn.Linear, {"in_features": 2**12, "out_features": 2**11}, False) is not None
    with pytest.raises(MemoryError, match="a tensor that does not fit into memory"):
        construct(nn.Linear, {"in_features": 2**13, "out_features": 2**12}, False)
