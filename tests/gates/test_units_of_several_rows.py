"""Units of several rows: the rows of a layer that code only takes together."""

import copy
from types import SimpleNamespace

import pytest
import torch
from test_awkward_networks import Net, conv, image
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.classes import codes, partitions, partitions_that_fit
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import relative_difference, remaining_gates, shrink, surviving_units
from pyro_sbp.pruning.costs import UnitCosts
from pyro_sbp.pruning.macs import count_macs


def gated_linear_unit():
    net = nn.Sequential(nn.Conv1d(3, 24, 3), nn.GLU(1), nn.Conv1d(12, 4, 3))
    return net, image(3, 8), {"0": (12, 24)}


def halves_apart():
    """Both halves go on, one of them through a layer more: they must remain equally wide."""

    def forward(n, x):
        first, second = n.a(x).relu().chunk(2, 1)
        return n.head(torch.cat([first, second, second + n.b(second).relu()], 1))

    net = Net(forward, a=conv(3, 12), b=conv(6, 6, 3), head=conv(18, 3))
    return net, image(3, 5, 5), {"a": (6, 12)}


def sub_pixels():
    net = nn.Sequential(conv(3, 16), nn.PixelShuffle(2), conv(4, 6), nn.ReLU(), conv(6, 2))
    return net, image(3, 4, 4), {"0": (4, 16), "2": (6, 6)}


def group_norm():
    net = nn.Sequential(conv(3, 12, 3), nn.GroupNorm(4, 12), nn.SiLU(), conv(12, 3))
    return net, image(3, 5, 5), {"0": (4, 12)}


def gates_of_a_recurrent_cell():
    def forward(n, x):
        h = x.new_zeros(len(x), n.o.out_channels, *x.shape[3:])
        for step in x.unbind(1):
            r, z = n.g(torch.cat([step, h], 1)).sigmoid().chunk(2, 1)
            h = (1 - z) * h + z * n.o(torch.cat([step, r * h], 1)).tanh()
        return n.head(h.mean((2, 3)))

    net = Net(forward, g=conv(10, 16, 3), o=conv(10, 8, 3), head=nn.Linear(8, 3))
    return net, image(3, 2, 4, 4), {"o": (8, 8)}


class FusedAttention(nn.Module):
    """One layer for queries, keys and values, with sizes in attributes."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.num_heads, self.head_dim, self.inner = heads, width // heads, width
        self.depth = heads  # what has nothing to do with heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * self.head_dim**-0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, self.inner))


def fused_attention():
    net = Net(lambda n, x: n.head(n.attn(x) + n.more(x)), attn=FusedAttention(),
              more=FusedAttention(), head=nn.Linear(12, 4))  # fmt: skip
    net = Net(lambda n, x: n.net(x).mean(1), net=net)
    return net, image(5, 12), {"net.attn.qkv": (3, 36), "net.more.qkv": (3, 36)}


def many_divisors():
    """144 rows, which many partitions fit."""
    net = Net(lambda n, x: n.head(n.attn(x)).mean(1), attn=FusedAttention(48, 6),
              head=nn.Linear(48, 4))  # fmt: skip
    return net, image(5, 48), {"attn.qkv": (6, 144)}


class SplitAttention(FusedAttention):
    """The same with the sizes of the parts in a tuple."""

    def __init__(self):
        super().__init__()
        self.parts = (12, 12, 12)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv(x).split(self.parts, -1)
        )
        return self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def split_attention():
    net = Net(lambda n, x: n.head(n.attn(x).relu()).mean(1), attn=SplitAttention(),
              head=nn.Linear(12, 4))  # fmt: skip
    return net, image(5, 12), {"attn.qkv": (3, 36)}


class GroupedQueries(nn.Module):
    """Attention in which every key and value serves several queries."""

    def __init__(self, width=16, heads=8, shared=4):
        super().__init__()
        self.head_dim, self.repeats, narrow = 4, heads // shared, 4 * shared
        self.query, self.out = nn.Linear(width, 4 * heads), nn.Linear(4 * heads, width)
        self.key, self.value = nn.Linear(width, narrow), nn.Linear(width, narrow)

    def forward(self, x):
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        k, v = (part.repeat_interleave(self.repeats, 1) for part in (k, v))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def grouped_queries():
    net = Net(lambda n, x: n.head(n.attn(x)).mean(1), attn=GroupedQueries(), head=nn.Linear(16, 3))
    return net, image(5, 16), {"attn.query": (4, 32)}


class GroupedQueriesInOneLayer(nn.Module):
    """The same with one layer for queries, keys and values, and sizes in attributes."""

    def __init__(self, width=16, heads=6, shared=3):
        super().__init__()
        self.head_dim, self.repeats = 4, heads // shared
        self.q_size, self.kv_size = 4 * heads, 4 * shared
        self.qkv = nn.Linear(width, self.q_size + 2 * self.kv_size)
        self.out = nn.Linear(self.q_size, width)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv(x).split([self.q_size, self.kv_size, self.kv_size], -1)
        )
        k, v = (part.repeat_interleave(self.repeats, 1) for part in (k, v))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def grouped_queries_in_one_layer():
    net = Net(lambda n, x: n.head(n.attn(x)).mean(1), attn=GroupedQueriesInOneLayer(),
              head=nn.Linear(16, 3))  # fmt: skip
    return net, image(5, 16), {"attn.qkv": (3, 48)}


class ReadsConfig(GroupedQueriesInOneLayer):
    """The same with numbers of heads in a configuration, which modules share."""

    def __init__(self, config):
        super().__init__(16, config.num_attention_heads, config.num_key_value_heads)
        self.config = config
        del self.q_size, self.kv_size

    def forward(self, x):
        self.q_size = self.config.num_attention_heads * self.head_dim
        self.kv_size = self.config.num_key_value_heads * self.head_dim
        out = super().forward(x)
        del self.q_size, self.kv_size
        return out


def heads_in_a_configuration():
    config = SimpleNamespace(num_attention_heads=6, num_key_value_heads=3, hidden_size=16)
    attention = nn.Sequential(ReadsConfig(config), nn.LayerNorm(16), ReadsConfig(config))
    net = Net(lambda n, x: n.head(n.attn(x)).mean(1), attn=attention, head=nn.Linear(16, 3))
    return net, image(5, 16), {"attn.0.qkv": (3, 48), "attn.2.qkv": (3, 48)}


def one_key_for_all():
    net = Net(lambda n, x: n.head(n.attn(x)).mean(1), attn=GroupedQueries(shared=1),
              head=nn.Linear(16, 3))  # fmt: skip
    return net, image(5, 16), {"attn.query": (8, 32)}


def a_map_over_all_channels():
    def forward(n, x):
        x = n.a(x).relu()
        return n.head(x * n.map(x).sigmoid())

    return (
        Net(forward, a=conv(3, 6), map=conv(6, 1), head=conv(6, 2)),
        image(3, 4, 4),
        {"a": (6, 6)},
    )


OF_LAYERS = [
    gated_linear_unit,
    halves_apart,
    sub_pixels,
    group_norm,
    gates_of_a_recurrent_cell,
    a_map_over_all_channels,
]
CASES = [
    *OF_LAYERS,
    fused_attention,
    many_divisors,
    split_attention,
    grouped_queries,
    one_key_for_all,
]
EACH = pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)


def found(make):
    torch.manual_seed(4)
    net, x, expected = make()
    net = net.double().eval()
    gates = [gate for gate in find_gates(net, x.double()) if gate.name in expected]
    return net, x.double(), gates, expected


def cut_one(net, gates, x, unit=1):
    theta = {gate.name: 0.5 + torch.rand(gate.size).double() for gate in gates}
    for value in theta.values():
        value[unit] = 0
    masked = GatedNetwork(net, gates)(x, {name: value[None] for name, value in theta.items()})
    units = surviving_units(gates, theta)
    small = shrink(net, gates, theta, x, units)
    assert relative_difference(masked, call(small, x)) <= 1e-10
    return small, units


@EACH
def test_rows_that_belong_together_are_one_unit_and_cut_exactly(make):
    net, x, gates, expected = found(make)
    rows = {
        gate.name: (gate.size, len(writer.units))
        for gate in gates
        for writer in gate.writers
        if writer.layer == gate.name
    }
    assert rows == expected
    small, units = cut_one(net, gates, x)
    for name, (size, number) in expected.items():
        weight = small.get_submodule(name).weight
        assert len(weight) == number // size * (size - 1)
        assert int(units[name].removed.sum()) == 1


@EACH
def test_a_network_that_was_cut_is_cut_again(make):
    net, x, gates, _ = found(make)
    small, units = cut_one(net, gates, x)
    remaining = remaining_gates(small, gates, units)
    assert [gate for gate in find_gates(small, x) if gate.name in units] == remaining
    cut_one(small, remaining, x, unit=0)


# The products inside attention, which are no layers, count as a constant.
@pytest.mark.parametrize("make", OF_LAYERS, ids=lambda make: make.__name__)
def test_the_expected_macs_are_those_of_the_network_that_remains(make):
    net, x, gates, _ = found(make)
    small, units = cut_one(net, gates, x)
    keep = {name: unit.remaining.double() for name, unit in units.items()}
    assert UnitCosts(net, gates, x).expected(keep) == pytest.approx(count_macs(small, x))


def test_only_the_sizes_that_have_to_follow_do():
    net, x, gates, _ = found(fused_attention)
    small, _ = cut_one(net, gates, x)
    attention = small.net.attn
    assert (attention.num_heads, attention.inner) == (2, 8)
    assert (attention.head_dim, attention.depth) == (4, 3)
    assert (net.net.attn.num_heads, net.net.attn.inner) == (3, 12)  # a copy
    assert "sizes: net.attn.num_heads, net.attn.inner" in repr(gates[0])


def test_sizes_in_a_tuple_follow():
    net, x, gates, _ = found(split_attention)
    small, _ = cut_one(net, gates, x)
    assert small.attn.parts == (8, 8, 8) and {size.place for size in gates[0].sizes} >= {0, 1, 2}


def test_a_group_of_a_norm_goes_whole():
    net, x, gates, _ = found(group_norm)
    small, _ = cut_one(net, gates, x)
    assert (small[1].num_groups, small[1].num_channels, len(small[1].weight)) == (3, 9, 9)


def test_a_norm_over_all_channels_leaves_no_units():
    net = nn.Sequential(conv(3, 12), nn.GroupNorm(1, 12), conv(12, 3))
    gates = find_gates(net, image(3, 4, 4))
    assert gates == [] and "several of its units" in gates.not_prunable["0"]


def test_partitions_are_of_equal_classes_from_fine_to_coarse():
    found = list(partitions(12))
    sizes = [int(classes.max()) + 1 for classes in found]
    assert sizes == sorted(sizes, reverse=True)
    assert all(len(set(classes.bincount().tolist())) == 1 for classes in found)
    rows = torch.arange(12)
    grouped = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1])  # 4 queries for each key
    for classes in (rows // 4, rows % 4, rows // 2 % 3, grouped):  # heads, halves, a fused layer
        assert any(torch.equal(classes, other) for other in found)


def test_partitions_that_fit_are_those_that_codes_do_not_exclude():
    rows = torch.arange(16)
    bits = codes(16)
    reached = rows // 4  # four columns, each reached by a block of rows
    hits = torch.stack([torch.stack([bit[reached == c].any() for c in range(4)]) for bit in bits])
    fitting = list(partitions_that_fit(hits[0::2], hits[1::2], 16))
    assert any(torch.equal(classes, rows // 4) for classes in fitting)
    assert not any(torch.equal(classes, rows % 8) for classes in fitting)
    assert int(fitting[0].max()) == 3


def test_modules_with_other_heads_have_a_configuration_of_their_own(tmp_path):
    net, x, _ = heads_in_a_configuration()
    gates = find_gates(net, x)
    theta = {gates[0].name: torch.tensor([1.0, 0.0, 1.0])}
    small = shrink(net, gates, theta, x)
    heads = [layer.config.num_attention_heads for layer in small.attn[::2]]
    assert heads == [4, 6] and net.attn[0].config.num_attention_heads == 6
    sbp.save(small, tmp_path / "small", constructor=lambda: heads_in_a_configuration()[0])
    loaded = sbp.load(tmp_path / "small", constructor=lambda: heads_in_a_configuration()[0])
    assert [layer.config.num_attention_heads for layer in loaded.attn[::2]] == heads
    assert relative_difference(small(x), loaded(x)) <= 1e-6


@pytest.mark.parametrize("make", [fused_attention, grouped_queries])
def test_the_network_stays_as_it_was(make):
    net, x, _ = make()
    before = copy.deepcopy(net)
    find_gates(net, x)
    for old, new in zip(before.modules(), net.modules(), strict=True):
        ints = {name: value for name, value in vars(old).items() if isinstance(value, int)}
        assert ints.items() <= vars(new).items()
