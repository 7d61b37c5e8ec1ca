"""Whatever treats channels alone between two layers is cut along, in whatever module it is."""

from __future__ import annotations

import pytest
import torch
from exact_cuts import check
from torch import Tensor, nn

import pyro_sbp as sbp


class Gain(nn.Module):
    """An offset and a gain for each channel, held by this module alone."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(shape))
        self.register_buffer("gain", torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.gain) + self.offset


class GainInPlace(Gain):
    """The same, into what the layer before it has answered."""

    def forward(self, x: Tensor) -> Tensor:
        x *= 1 + self.gain
        x += self.offset
        return x


class FrozenNorm(nn.Module):
    """A norm that keeps its numbers under names of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_features = channels
        for name in ("scale", "shift", "centre", "spread"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale * (self.spread + 1e-5).rsqrt()
        shift = self.shift - self.centre * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class UnitLength(nn.Module):
    """Scales the positions of each channel to length 1, then by a weight for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x.flatten(2), dim=2).view_as(x) * self.weight[:, None, None]


class PositionsOfHeads(nn.Module):
    """Attention that adds a table of relative positions with a column for each head."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.num_heads, self.head_dim = heads, width // heads
        self.table = nn.Parameter(torch.randn(2 * length - 1, heads))
        places = torch.arange(length)
        self.register_buffer("index", places[:, None] - places + length - 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) + self.table[self.index].permute(2, 0, 1)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class BiasOfQueries(nn.Module):
    """Attention with a bias that is added to the queries, some numbers for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.num_heads = heads
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

        q, k, v = split(self.qkv(x)).chunk(3, -1)
        q, v = q + split(self.q_bias[None]), v + split(self.v_bias[None])
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class BiasOfFusedLayer(BiasOfQueries):
    """The same with the biases in the call of the layer, which has none of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.register_buffer("k_bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        qkv = nn.functional.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class CosineAttention(BiasOfFusedLayer):
    """Attention of Swin V2: a scale for each head, and positions from a network of its own."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__(width, heads)
        self.logit_scale = nn.Parameter(torch.rand(heads, 1, 1))
        self.positions = nn.Sequential(
            nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, heads, bias=False)
        )
        places = torch.arange(length)
        self.register_buffer("between", (places[:, None] - places)[..., None].float())

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        qkv = nn.functional.linear(x, self.qkv.weight, bias)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = nn.functional.normalize(qkv[:2], dim=-1)
        scores = q @ k.mT * self.logit_scale.clamp(max=4).exp()
        scores = scores + 16 * self.positions(self.between).permute(2, 0, 1).sigmoid()
        return self.out((scores.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2))


def conv(*sizes: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(*sizes, **options)


def between(*layers: nn.Module) -> nn.Module:
    """A network of two convolutions and what stands between them."""
    return nn.Sequential(conv(3, 8, 3), *layers, nn.ReLU(), conv(8, 4, 1))


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.SyncBatchNorm(8),
        lambda: nn.GroupNorm(8, 8),
        lambda: FrozenNorm(8),
        lambda: UnitLength(8),
        lambda: Gain(1, 8, 1, 1),
        lambda: Gain(8, 1, 1),
        lambda: GainInPlace(8, 1, 1),
        lambda: nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8),
        lambda: nn.Sequential(Gain(8, 1, 1), FrozenNorm(8), Gain(1, 8, 1, 1)),
    ],
)
def test_what_treats_channels_alone_is_resized(layer):
    torch.manual_seed(0)
    net = between(layer())
    small = check(net, IMAGES, **{"0": 8})
    shapes = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
    assert not any(8 in shape for shape in shapes.values()), shapes


def test_the_numbers_of_a_norm_follow_in_its_attributes():
    assert check(between(FrozenNorm(8)), IMAGES, **{"0": 8})[1].num_features == 5


def test_a_gain_over_a_concatenation_belongs_to_two_gates():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gain = conv(3, 4, 1), conv(3, 6, 1), Gain(10, 1, 1)
            self.c = conv(10, 2, 1)

        def forward(self, x):
            return self.c(self.gain(torch.cat([self.a(x), self.b(x)], 1)).relu())

    torch.manual_seed(0)
    small = check(Joined(), IMAGES, a=4, b=6)
    assert small.gain.offset.shape == (2 + 4, 1, 1)


def test_a_table_with_a_column_for_each_head_follows_the_heads():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), PositionsOfHeads(12, 3, 4), nn.ReLU(), nn.Linear(12, 2))
    small = check(net, torch.randn(2, 4, 5), **{"0": 12, "1.qkv": 3, "1.out": 12})
    assert small[1].table.shape == (7, 2) and small[1].num_heads == 2


@pytest.mark.parametrize("attention", [BiasOfQueries, BiasOfFusedLayer])
def test_a_parameter_with_some_numbers_for_each_head_follows_the_heads(attention):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), attention(12, 3), nn.ReLU(), nn.Linear(12, 2))
    small = check(net, torch.randn(2, 4, 5), **{"0": 12, "1.qkv": 3, "1.out": 12})
    assert small[1].q_bias.shape == small[1].v_bias.shape == (8,)


def test_scales_and_positions_of_heads_follow_the_heads():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), CosineAttention(12, 3, 4), nn.ReLU(), nn.Linear(12, 2))
    sizes = {"0": 12, "1.positions.2": 3, "1.positions.0": 16, "1.out": 12}
    small = check(net, torch.randn(2, 4, 5), **sizes)
    assert small[1].logit_scale.shape == (2, 1, 1) and small[1].positions[2].out_features == 2


def test_a_bias_in_the_call_of_a_layer_follows_its_channels():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.offset = conv(8, 6, 3, bias=False), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.layer.weight, 2 * self.offset)

    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 8, 3), nn.ReLU(), Own(), nn.ReLU(), conv(6, 2, 1))
    assert check(net, IMAGES, **{"0": 8, "2.layer": 6})[2].offset.shape == (4,)


def test_a_parameter_for_each_position_stays():
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 8, 3), Gain(4, 4), nn.ReLU(), conv(8, 4, 1))
    assert check(net, IMAGES, **{"0": 8})[1].offset.shape == (4, 4)


def test_cut_tensors_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    net = TwoNorms()
    small = check(net, IMAGES, first=8)
    sbp.save(small, tmp_path / "small", constructor=TwoNorms)
    loaded = sbp.load(tmp_path / "small", constructor=TwoNorms)
    assert loaded.frozen.num_features == 5 and loaded.sync.num_features == 5
    assert torch.equal(loaded(IMAGES.double()), small(IMAGES.double()))


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.sync, self.frozen = conv(3, 8, 3), nn.SyncBatchNorm(8), FrozenNorm(8)
        self.gain, self.last = Gain(1, 8, 1, 1), conv(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gain(self.frozen(self.sync(self.first(x)))).relu())
