"""Nested inputs: what is opened is also converted, whatever it is made of."""

import threading
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pyro_sbp.gates.calling import call
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.nested import convert, map_tensors, tensors_of
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.pruning.budgets import MacsRatio
from pyro_sbp.pruning.choosing import choose_units
from pyro_sbp.pruning.exactness import checked_shrink
from pyro_sbp.pruning.macs import count_macs


class Encoding(UserDict):
    """As transformers' BatchEncoding: a mapping that also gives its entries as attributes."""

    def __init__(self, data, encodings=None):
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class ModelOutput(OrderedDict):
    """As transformers': the entries of a dict are attributes too."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__.update(entries)

    def __reduce__(self):
        return _model_output, (dict(self),)


def _model_output(entries):
    return ModelOutput(**entries)


class Wrapping(MutableMapping):
    """A mapping whose shallow copy shares its entries."""

    def __init__(self, entries):
        self.entries = entries

    def __getitem__(self, key):
        return self.entries[key]

    def __setitem__(self, key, value):
        self.entries[key] = value

    def __delitem__(self, key):
        del self.entries[key]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


class Fixed(Mapping):
    """A mapping that cannot be written to."""

    def __init__(self, *pairs):
        self.pairs = pairs

    def __getitem__(self, key):
        return dict(self.pairs)[key]

    def __iter__(self):
        return iter(dict(self.pairs))

    def __len__(self):
        return len(self.pairs)


class Computing(Fixed):
    """A mapping that computes its entries."""

    def __getitem__(self, key):
        return super().__getitem__(key) * 2


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Checked(namedtuple("Checked", ["a", "b"])):
    """A named tuple with a constructor of its own."""

    def __new__(cls, both):
        return super().__new__(cls, *both)

    def __getnewargs__(self):
        return (tuple(self),)


class Stack(list):
    """A list with an attribute, and a constructor of its own."""

    def __init__(self, name, *values):
        super().__init__(values)
        self.name = name


@dataclass
class Plain:
    a: Tensor
    b: Tensor
    name: str = "plain"


@dataclass(frozen=True)
class Frozen:
    a: Tensor
    b: Tensor = field(init=False)
    absent: Tensor = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "b", -self.a)


@dataclass(frozen=True, slots=True)
class Slotted:
    a: Tensor
    b: Tensor


A, B = torch.randn(2, 3), torch.randn(2, 4)
STRUCTURES = {
    "dict": {"a": A, "b": B},
    "OrderedDict": OrderedDict(a=A, b=B),
    "defaultdict": defaultdict(list, {"a": A, "b": B}),
    "UserDict": UserDict({"a": A, "b": B}),
    "encoding": Encoding({"a": A, "b": B}, encodings=["text"]),
    "model output": ModelOutput(a=A, b=B),
    "wrapping mapping": Wrapping({"a": A, "b": B}),
    "fixed mapping": Fixed(("a", A), ("b", B)),
    "mapping proxy": MappingProxyType({"a": A, "b": B}),
    "list": [A, B],
    "tuple": (A, B),
    "list subclass": Stack("stack", A, B),
    "named tuple": Pair(A, B),
    "named tuple with a constructor": Checked((A, B)),
    "torch's return type": torch.return_types.max((A, B)),
    "dataclass": Plain(A, B),
    "frozen dataclass": Frozen(A),
    "slotted dataclass": Slotted(A, B),
    "all of them": {"x": [Plain(A, B), (Encoding({"a": A}), MappingProxyType({"b": [B]}))]},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_is_opened_is_converted(name):
    x = STRUCTURES[name]
    before = [tensor.clone() for tensor in tensors_of(x)]
    assert len(before) >= 2
    converted = convert(x, torch.float64, torch.device("cpu"))
    assert type(converted) is type(x)
    found = list(tensors_of(converted))
    assert [tensor.dtype for tensor in found] == [torch.float64] * len(before)
    for new, old, now in zip(found, before, tensors_of(x), strict=True):
        assert torch.equal(new, old.double()) and new.data_ptr() != now.data_ptr()
        assert torch.equal(now, old) and now.dtype == torch.float32  # the original stays
    assert all(tensor.is_meta for tensor in tensors_of(convert(x, torch.float32, META)))


META = torch.device("meta")


def test_what_else_a_structure_holds_is_kept():
    encoding = convert(STRUCTURES["encoding"], torch.float64)
    assert encoding.encodings == ["text"] and encoding.a is encoding["a"]
    assert encoding.encodings is not STRUCTURES["encoding"].encodings
    output = convert(STRUCTURES["model output"], torch.float64)
    assert output.a is output["a"] and output.a.dtype == torch.float64
    stack = convert(STRUCTURES["list subclass"], torch.float64)
    assert stack.name == "stack"
    assert convert(STRUCTURES["defaultdict"], torch.float64)["new"] == []
    frozen = convert(STRUCTURES["frozen dataclass"], torch.float64)
    assert torch.equal(frozen.b, -frozen.a) and not hasattr(frozen, "absent")
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 3, 4), [3, 2], batch_first=True)
    other = convert(packed, torch.float64)
    assert other.data.dtype == torch.float64 and torch.equal(other.batch_sizes, packed.batch_sizes)


def test_a_tensor_that_occurs_twice_stays_one():
    calls = []
    a, (b, c) = map_tensors(lambda t: calls.append(t) or t + 1, (A, [A, B]))
    assert a is b and c is not b and len(calls) == 2


def test_gradients_are_cut_and_numbers_of_other_kinds_keep_their_type():
    grown = (torch.ones(2, requires_grad=True) * 2, torch.tensor([1, 2]), torch.tensor([True]))
    new = convert(grown, torch.float64)
    assert [tensor.dtype for tensor in new] == [torch.float64, torch.int64, torch.bool]
    assert not new[0].requires_grad


class Colour(Enum):
    RED = "red"


def test_objects_that_cannot_be_opened_are_passed_on_and_refused():
    lock = threading.Lock()  # which cannot be copied
    x = {"a": A, "lock": lock, "more": [None, 1, 2.0, 3j, b"", Colour.RED, torch.float32, META]}
    new = convert(x, torch.float64)
    assert new["lock"] is lock and new["more"] == x["more"] and new["a"].dtype == torch.float64
    with pytest.raises(TypeError, match="cannot look into a lock for tensors"):
        list(tensors_of(x))
    del x["lock"]
    assert list(tensors_of(x)) == [A]


def test_a_mapping_that_computes_its_tensors_is_refused():
    with pytest.raises(TypeError, match="cannot put other tensors into a Computing"):
        convert(Computing(("a", A)), torch.float64)


class Reads(nn.Module):
    """A small network of a structure with the tensors `a` and `b`."""

    def __init__(self, get):
        super().__init__()
        self.get = get
        self.a, self.b = nn.Linear(3, 5), nn.Linear(4, 5)
        self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, *args, **kwargs):
        a, b = self.get(kwargs or (args if len(args) > 1 else args[0]))
        y = self.head(self.hidden((self.a(a) + self.b(b)).relu()).relu())
        return Plain(y, y.sum())


def entries(x):
    return x["a"], x["b"]


def attributes(x):
    return x.a, x.b


GETTERS = {
    "dict": entries,
    "OrderedDict": entries,
    "UserDict": entries,
    "encoding": entries,
    "wrapping mapping": entries,
    "fixed mapping": entries,
    "mapping proxy": entries,
    "list": tuple,
    "tuple": tuple,
    "named tuple": tuple,
    "list subclass": tuple,
    "encoding as one argument": attributes,
    "dataclass": attributes,
    "slotted dataclass": attributes,
}


INPUTS = {**STRUCTURES, "encoding as one argument": (STRUCTURES["encoding"],)}


@pytest.mark.parametrize("name", GETTERS)
def test_networks_of_any_input_are_gated_and_cut_exactly(name):
    torch.manual_seed(0)
    net, x = Reads(GETTERS[name]).eval(), INPUTS[name]
    gates = find_gates(net, x)
    assert {gate.name: gate.size for gate in gates} == {"a": 5, "hidden": 6}, gates.not_prunable
    theta = {gate.name: torch.rand(gate.size) for gate in gates}
    theta["hidden"][:3] = 0
    small, check = checked_shrink(net, gates, theta, x)
    assert check.max_rel_diff_float64 <= 1e-12 and small.hidden.out_features == 3
    macs = 2 * (3 * 5 + 4 * 5 + 5 * 6 + 6 * 2)
    assert count_macs(net, x) == macs
    snr = {name: value + 0.1 for name, value in theta.items()}
    choice = choose_units(net, gates, theta, snr, x, budget=MacsRatio(1.2))
    assert any(bool(unit.removed.any()) for unit in choice.units.values())
    torch.testing.assert_close(GatedNetwork(net, gates)(x, {}).a, call(net, x).a)


def test_tuples_are_positional_arguments_and_mappings_are_named_ones():
    def given(*args, **kwargs):
        return args, kwargs

    for name, x in STRUCTURES.items():
        args, kwargs = call(given, x)
        if isinstance(x, Mapping):
            assert args == () and list(kwargs) == list(x), name
            assert all(kwargs[key] is x[key] for key in x), name
        elif isinstance(x, tuple):
            assert args == tuple(x) and not kwargs, name
        else:
            assert len(args) == 1 and args[0] is x and not kwargs, name
        args, kwargs = call(given, (x,))
        assert len(args) == 1 and args[0] is x and not kwargs, name
