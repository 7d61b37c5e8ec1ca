"""Layers that no other layer reads are cut with what they are added to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import relative_difference, shrink


class Skips(nn.Module):
    """A residual stream of which only sums of what each block adds are used, as in WaveNet."""

    def __init__(self, norm: bool, width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.inner = nn.ModuleList(nn.Conv1d(width, 6, 3, padding=1) for _ in range(blocks))
        self.skip = nn.ModuleList(nn.Conv1d(6, 5, 1) for _ in range(blocks))
        self.back = nn.ModuleList(
            nn.Sequential(nn.Conv1d(6, width, 1), *([nn.BatchNorm1d(width)] if norm else []))
            for _ in range(blocks)
        )
        self.last = nn.Conv1d(5, 2, 1)

    def forward(self, x):
        x, total = self.first(x), 0
        for inner, skip, back in zip(self.inner, self.skip, self.back, strict=True):
            z = inner(x).tanh()
            x, total = x + back(z), total + skip(z)
        return self.last(total.relu())


@pytest.mark.parametrize("norm", [False, True])
def test_the_last_layer_of_a_stream_is_cut_along(norm):
    torch.manual_seed(0)
    net, x = Skips(norm).double().eval(), torch.randn(2, 1, 9).double()
    gates = find_gates(net, x)
    names = {gate.name: [span.layer for span in gate.writers] for gate in gates}
    assert names["first"] == ["first", "back.0.0", "back.1.0"]
    theta = {gate.name: torch.linspace(0.5, 1.5, gate.size).double() for gate in gates}
    for value in theta.values():
        value[1::3] = 0
    with torch.no_grad():
        small = shrink(net, gates, theta, x)
        assert relative_difference(GatedNetwork(net, gates)(x, theta), small(x)) < 1e-12
    assert small.back[1][0].out_channels == 5


def test_a_layer_whose_output_is_dropped_has_no_units():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            self.b(x).relu()
            return self.c(self.a(x).relu())

    gates = find_gates(Dropped(), torch.randn(2, 3))
    assert [gate.name for gate in gates] == ["a"]
    assert gates.not_prunable["b"] == "no layer reads it"


def test_an_unread_layer_beside_a_stream_that_is_not_prunable_has_no_units():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            x = self.norm(self.a(x))
            out = self.c(x)
            x + self.b(x)
            return out

    gates = find_gates(Mixed(), torch.randn(2, 3))
    assert gates == [] and gates.not_prunable["b"] == "no layer reads it"
