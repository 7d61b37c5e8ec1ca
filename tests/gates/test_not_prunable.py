"""Every layer and parameter that no gate reaches has a reason, and a share of the parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.pruning.macs import shares_not_prunable


class Mixed(nn.Module):
    """A stream that a layer norm mixes, an offset, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.offset, self.unused = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(3))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.norm(self.first(x) + self.offset)
        return self.last(x + self.attention(x, x, x)[0])


class NormalisedWeight(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


def test_all_parameters_are_accounted_for():
    torch.manual_seed(0)
    net, x = Mixed(), torch.randn(2, 3, 4)
    gates = find_gates(net, x)
    assert gates == []
    left = gates.not_prunable
    assert left["norm"] == left["offset"] == "meets the units of 'first', which is not prunable"
    assert left["unused"] == "is not used on the example"
    assert "separate_attention" in left["attention"]
    assert sum(gates.shares.values()) == pytest.approx(1)
    assert gates.shares["norm"] == 16 / sum(p.numel() for p in net.parameters())
    macs = {name: share for name, (_, share) in shares_not_prunable(net, gates, x).items()}
    assert macs["first"] == 2 * 3 * 4 * 8 / sbp.count_macs(net, x) and macs["offset"] == 0


def test_a_model_without_gates_names_the_reasons():
    gates = find_gates(Mixed(), torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"there are no gates.*first: .*reach the same column"):
        sbp.GatedModel(Mixed(), gates, num_data=2)


def test_other_writers_of_units_that_cannot_be_cut_are_named():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x) + self.b(x)
            return self.c(x) * x.shape[1]

    gates = find_gates(Counting(), torch.randn(2, 4))
    assert gates == [] and "cutting it" in gates.not_prunable["a"]
    assert gates.not_prunable["b"] == "has the units of 'a', which is not prunable"


def test_a_weight_that_is_computed_is_refused_by_its_name():
    net = nn.Sequential(NormalisedWeight(4, 8), nn.ReLU(), nn.Linear(8, 2))
    gates = find_gates(net, torch.randn(2, 4))
    assert gates.not_prunable["0"] == "computes another weight from its own in every call"


def test_the_code_that_takes_a_width_from_its_input_is_named():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.out = 3, nn.Linear(6, 18), nn.Linear(6, 2)

        def forward(self, x):
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            x = (q @ k.mT).softmax(-1) @ v
            return self.out(x.transpose(1, 2).reshape(b, n, c))

    torch.manual_seed(0)
    gates = find_gates(Attention(), torch.randn(2, 4, 6))
    assert gates == []
    assert gates.not_prunable["qkv"].startswith(
        "cutting it fails: shape '[2, 4, 6]' is invalid for input of size 32, "
        "in `x.transpose(1, 2).reshape(b, n, c)` (test_not_prunable.py, line "
    )
