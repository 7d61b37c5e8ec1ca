"""The measurements of several writers share calls of the network, and must not be mixed up."""

import itertools

import pytest
import torch
from torch import nn

from pyro_sbp import find_gates
from pyro_sbp.gates.flow import Flow
from tests.gates.exact_cuts import check

# An iterator, because `find_gates` restores the lists that a network changes.
CALLS = itertools.count()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Stream(nn.Module):
    """Blocks that are added to one stream; some of them add their channels in reverse order."""

    def __init__(self, blocks: int, reverse: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.inner = nn.ModuleList(nn.Linear(8, 6) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Linear(6, 8) for _ in range(blocks))
        self.reverse = reverse

    def forward(self, x):
        next(CALLS)
        x = self.stem(x)
        for block, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True)):
            y = outer(inner(x).relu())
            x = x + (y.flip(-1) if block in self.reverse else y)
        return self.head(x)


def _calls(blocks: int) -> int:
    """How often `find_gates` calls a network."""
    before = next(CALLS)
    find_gates(Stream(blocks), torch.randn(2, 4))
    return next(CALLS) - before - 1


def test_a_deeper_inner_layer_needs_no_calls_of_its_own():
    # Only the writers of the stream, which reach the same layers, have a pass each.
    assert _calls(12) - _calls(2) == 10


@pytest.mark.parametrize("reverse", [{}, {0, 1, 2}, {1}], ids=["none", "all", "one"])
def test_writers_of_a_stream_keep_their_own_rows(reverse):
    net, x = Stream(3, frozenset(reverse)), torch.randn(2, 4)
    stream = find_gates(net, x)[0]
    assert [span.layer for span in stream.writers] == ["stem", "outer.0", "outer.1", "outer.2"]
    for block, span in enumerate(stream.writers[1:]):
        units = span.units.flip(0) if block in reverse else span.units
        assert torch.equal(units, stream.writers[0].units)
    check(net, x, **{"stem": 8, "inner.0": 6, "inner.1": 6, "inner.2": 6})


@pytest.mark.parametrize(
    "outside",
    [
        pytest.param(lambda x: torch.from_numpy(x.detach().numpy()), id="numpy"),
        pytest.param(lambda x: torch.tensor(x.tolist(), dtype=x.dtype), id="list"),
    ],
)
def test_values_that_leave_torch_are_found(outside):
    class Leaving(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
            self.head = nn.Linear(9, 2)

        def forward(self, x):
            kept = outside(self.a(x))
            return self.head(torch.cat([self.c(self.b(x).relu()), kept], -1))

    check(Leaving(), torch.randn(2, 4), a=6, b=6, c=3)


def test_a_number_that_leaves_torch_is_found():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            factor = float(self.a(x).mean())
            return self.head(self.c(self.b(x).relu()) * factor)

    gates = find_gates(Scaled(), torch.randn(2, 4))
    assert {gate.writers[0].layer: gate.size for gate in gates} == {"b": 6, "c": 3}
    assert "several of its units reach the same column" in gates.not_prunable["a"]


def test_tensors_between_layers_are_attributed_to_their_own_writer():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
            self.gain_a, self.gain_b = (nn.Parameter(torch.rand(n)) for n in (6, 5))

        def forward(self, x):
            return self.head((self.b(self.a(x).relu() * self.gain_a) * self.gain_b).relu())

    check(Scales(), torch.randn(2, 4), a=6, b=5)


class EarlyExit(nn.Module):
    """A network that stops after a block if an exit is certain, which NaN would make it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.inner = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
        self.outer = nn.ModuleList(nn.Linear(6, 8) for _ in range(3))
        self.exits = nn.ModuleList(nn.Linear(8, 3) for _ in range(3))

    def forward(self, x):
        x, answers = self.stem(x), []
        for inner, outer, leave in zip(self.inner, self.outer, self.exits, strict=True):
            x = x + outer(inner(x).relu())
            answers.append(leave(x))
            if not answers[-1].softmax(-1).amax() < 2:
                break
        return answers


def test_nan_of_one_writer_that_skips_layers_hides_no_other_writer():
    sizes = {"stem": 8, "inner.0": 6, "inner.1": 6, "inner.2": 6}
    gates = find_gates(EarlyExit(), torch.randn(3, 4))
    assert {gate.name: gate.size for gate in gates} == sizes, gates.not_prunable


def test_a_comparison_that_one_writer_makes_false_hides_no_other_writer():
    class Compared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)
            self.m, self.l, self.head = nn.Linear(8, 5), nn.Linear(8, 5), nn.Linear(5, 2)

        def forward(self, x):
            s = self.a(x)
            total = s + self.b(s.relu())
            chosen = torch.where(s.abs() < 1e9, total, torch.zeros_like(s))
            return self.head((self.m(total).relu() + self.l(chosen)).relu())

    check(Compared(), torch.randn(3, 4), a=8, m=5)


@pytest.mark.parametrize("part", ["real", "imag"])
def test_a_part_of_a_complex_tensor_that_is_set_is_followed(part):
    flow = Flow()
    written, z = torch.randn(3), torch.zeros(3, dtype=torch.complex64)
    flow.write("a", written)
    flow.follow(getattr(torch.Tensor, part).__set__, (z, written), {}, None)
    flow.reach("c", [z])
    assert flow.reached_by("a") == {"c"}


def test_sparse_tensors_and_operators_that_change_an_argument_are_followed():
    flow = Flow()
    written = torch.randn(3, 3)
    flow.write("a", written)
    product = torch.eye(3).to_sparse() * 2
    flow.follow(torch.mul, (written, 2), {}, product)
    flow.reach("b", [product])
    target = torch.zeros(3, 3)
    flow.follow(torch.ops.aten.add_.Tensor, (target, written), {}, None)
    flow.reach("c", [target])
    assert flow.reached_by("a") == {"b", "c"}
    # A new tensor without marks, at an address that had some.
    flow.follow(torch.zeros, (3,), {}, written)
    flow.reach("d", [written])
    assert flow.reached_by("a") == {"b", "c"}
