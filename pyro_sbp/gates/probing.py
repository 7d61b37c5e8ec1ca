"""Find where noise can stand in a network, by measuring which columns each unit reaches.

A NaN put into an output channel of a layer (a writer) shows up in exactly the input columns of the
layers (readers) that the channel reaches, through flatten, concatenation, pooling or sums, whatever
the network's code. Channel numbers are coded in bits, so that 2 log2(channels) passes tell all
channels of a writer apart: a column that saw exactly one of each bit and its complement is reached
by one channel, whose number the bits spell. Writers that reach no column in common share a pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, overload

import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pyro_sbp.errors import did_you_mean, first_line
from pyro_sbp.gates.folding import Gate, Span, call, repeatable
from pyro_sbp.gates.layers import (
    Select,
    channel_dim,
    groups_of,
    is_channelwise,
    is_matrix,
    is_reader,
    num_columns,
    num_rows,
    serves,
)
from pyro_sbp.gates.nested import convert, tensors_of
from pyro_sbp.gates.proving import Proof, copy_for_measurement

__all__ = ["Gates", "find_gates"]


class Gates(list[Gate]):
    """A list of gates in the order of data flow.

    A slice or a copy of it has the same attributes. Sums and multiples (``+``, ``*``) are plain
    lists without them, as they are not the gates of one network.

    Attributes:
        left_alone: from the layers that are not prunable to the reason.
        called: the layers with a weight, in the order in which the network first calls them.
    """

    def __init__(
        self,
        gates: Iterable[Gate] = (),
        left_alone: Mapping[str, str] | None = None,
        called: Sequence[str] = (),
    ):
        super().__init__(gates)
        self.left_alone = dict(left_alone or {})
        self.called = tuple(called)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Gate: ...

    @overload
    def __getitem__(self, index: slice) -> Gates: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Gate | Gates:
        found = super().__getitem__(index)
        return self._with(found) if isinstance(found, list) else found

    def copy(self) -> Gates:
        """A shallow copy."""
        return self._with(self)

    def _with(self, gates: Iterable[Gate]) -> Gates:
        return Gates(gates, self.left_alone, self.called)


class _Astray(Exception):
    """NaN changes more than numbers: which layers are called, or whether any are."""


class _Through(BaseException):
    """All that a pass is to see has been seen."""


class _Probe(TorchFunctionMode):
    """Watch the layers of a network, known by their weight or running mean, while it is called.

    The first call caches what every matrix layer answers. In later ones each answers with its
    cached output, so that a NaN injected into one layer's output stops at the layers it reaches.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.layers: dict[int, tuple[str, nn.Module]] = {}
        for name, module in net.named_modules():
            if isinstance(module, Select):
                self.layers[id(module.index)] = (name, module)
            elif is_matrix(module) or is_channelwise(module):
                # Only what the module holds: a weight that is computed is another one each time.
                for tensor in (
                    module._parameters.get("weight"),
                    module._buffers.get("weight"),
                    module._buffers.get("running_mean"),
                ):
                    if tensor is not None:
                        self.layers.setdefault(id(tensor), (name, module))
        self.used: set[int] = set()
        self.clean: dict[str, list[Tensor]] = {}
        self.total: Counter[str] = Counter()
        self.start(None)

    def start(
        self, inject: Mapping[str, Tensor] | None, until: Iterable[str] | None = None
    ) -> None:
        """Begin a pass.

        Args:
            inject: from writers to the channels that NaN goes into; None in the first pass.
            until: the layers after whose calls the rest of the network may be left out.
        """
        self.inject = inject
        self.seen: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()
        self.awaited = None if until is None else set(until)

    @property
    def uncalled(self) -> list[str]:
        """Matrix layers of whose weight nothing made use in the first pass."""
        names = []
        for name in _matrices(self.net):
            weight = self.net.get_submodule(name)._parameters.get("weight")
            parent = self.net.get_submodule(name.rpartition(".")[0])
            inside = isinstance(parent, nn.MultiheadAttention)
            if weight is not None and id(weight) not in self.used and not inside:
                names.append(name)
        return names

    def _layer(self, func: Any, args: Any, kwargs: Any) -> tuple[str, nn.Module] | None:
        for value in (*args, *kwargs.values()):
            found = self.layers.get(id(value))
            if found is not None and serves(func, found[1]):
                return found
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inject is None:
            self.used.update(id(value) for value in (*args, *kwargs.values()))
        found = self._layer(func, args, kwargs)
        if found is None:
            return func(*args, **kwargs)
        name, layer = found
        index = self.calls[name]
        self.calls[name] += 1
        if not isinstance(layer, nn.Embedding):
            x: Tensor = args[0] if args else kwargs["input"]
            dim = channel_dim(layer, x)
            # A sum is NaN where one of its numbers is, and needs no copy of them.
            rest = [d for d in range(x.ndim) if d != dim]
            hit = (x.sum(rest) if rest else x).isnan()
            self.seen[name] = self.seen[name] | hit if name in self.seen else hit
        if self.inject is None:
            self.total[name] += 1
            out = func(*args, **kwargs)
            if is_matrix(layer):
                self.clean.setdefault(name, []).append(out.clone())
            return out
        if self.awaited is not None and self.calls[name] == self.total[name]:
            self.awaited.discard(name)
            if not self.awaited:
                raise _Through
        if not is_matrix(layer):
            return func(*args, **kwargs)
        out = self.clean[name][index].clone()
        if name in self.inject:
            out.movedim(channel_dim(layer, out), 0)[self.inject[name]] = torch.nan
        return out


@dataclass
class _Reach:
    """Where the units of one writer arrive.

    `blocks` is the number of a unit that each row belongs to: its own, but where a layer's rows
    only make sense together, as those of the queries of an attention head.
    """

    writer: str
    blocks: Tensor
    seen: dict[str, Tensor] = field(default_factory=dict)  # layer -> columns that any unit reaches
    columns: dict[str, Tensor] = field(default_factory=dict)  # layer -> unit of each column, or -1
    problem: str | None = None

    @property
    def size(self) -> int:
        return int(self.blocks.max()) + 1


def _codes(size: int) -> Tensor:
    """Patterns ``[2 * bits, size]``: which units a pass sets, each bit and then its opposite."""
    bits = max(1, (size - 1).bit_length())
    numbers = torch.arange(size, device="cpu")
    ones = torch.stack([(numbers >> bit) & 1 for bit in range(bits)]).bool()
    return torch.stack([ones, ~ones], 1).flatten(0, 1)


def _blocks(net: nn.Module, writer: str) -> Tensor:
    parent, _, name = writer.rpartition(".")
    rows = torch.arange(num_rows(net.get_submodule(writer)), device="cpu")
    return rows // getattr(net.get_submodule(parent), "row_blocks", {}).get(name, 1)


def _pass(
    net: nn.Module,
    probe: _Probe,
    x: Any,
    inject: Mapping[str, Tensor],
    until: Iterable[str] | None = None,
) -> bool:
    """One call with NaN in some channels; whether an output of the network is reached.

    Raises:
        _Astray: the network does not take its usual course.
    """
    probe.start(inject, until)
    try:
        # The fused kernels of attention lose a NaN.
        with repeatable(torch.float32), probe, sdpa_kernel(SDPBackend.MATH):
            output = call(net, convert(x, torch.float32))
    except _Through:
        return False
    except Exception as error:  # a network's own code may raise anything
        raise _Astray(f"NaN in it leads the network astray: {first_line(error)}") from error
    numbers = (t for t in tensors_of(output) if t.is_floating_point() or t.is_complex())
    return any(bool(t.isnan().any()) for t in numbers)


def _measure(net: nn.Module, probe: _Probe, x: Any, writers: Sequence[str]) -> list[_Reach]:
    """Where the units of all writers arrive."""
    reaches = []
    for writer in writers:
        reach = _Reach(writer, _blocks(net, writer))
        reaches.append(reach)
        try:
            every = torch.ones(len(reach.blocks), dtype=torch.bool, device="cpu")
            if _pass(net, probe, x, {writer: every}):
                reach.problem = "reaches an output of the network"
                continue
        except _Astray as error:
            reach.problem = str(error)
            continue
        reach.seen = {name: hit for name, hit in probe.seen.items() if bool(hit.any())}
        if not any(is_reader(net.get_submodule(name)) for name in reach.seen):
            reach.problem = "no layer reads it"
    for together in _apart([reach for reach in reaches if reach.problem is None]):
        _decode(net, probe, x, together)
    return reaches


def _apart(reaches: Sequence[_Reach]) -> list[list[_Reach]]:
    """Writers in sets of which no two reach a column in common."""
    sets: list[tuple[list[_Reach], dict[str, Tensor]]] = []
    for reach in reaches:
        for chosen in sets:
            taken = chosen[1]
            if not any(bool((taken[n] & h).any()) for n, h in reach.seen.items() if n in taken):
                break
        else:
            chosen = ([], {})
            sets.append(chosen)
        members, taken = chosen
        members.append(reach)
        for name, hit in reach.seen.items():
            taken[name] = taken[name] | hit if name in taken else hit
    return [members for members, _ in sets]


def _decode(net: nn.Module, probe: _Probe, x: Any, reaches: Sequence[_Reach]) -> None:
    """Find the unit of every column that writers which do not meet reach."""
    codes = {reach.writer: _codes(reach.size) for reach in reaches}
    numbers = {
        r.writer: {
            n: torch.zeros(len(h), dtype=torch.long, device="cpu") for n, h in r.seen.items()
        }
        for r in reaches
    }
    for bit in range(max(map(len, codes.values())) // 2):
        active = [r for r in reaches if r.problem is None and 2 * bit < len(codes[r.writer])]
        if not active:
            break
        hits = []
        for half in range(2):
            chosen = {r.writer: codes[r.writer][2 * bit + half][r.blocks] for r in active}
            try:
                _pass(net, probe, x, chosen, {name for r in active for name in r.seen})
            except _Astray as error:
                for reach in active:
                    reach.problem = str(error)
            hits.append(probe.seen)
        for reach in [reach for reach in active if reach.problem is None]:
            for name, seen in reach.seen.items():
                if name not in hits[0] or name not in hits[1]:
                    reach.problem = f"layer {name!r} is not called every time"
                    break
                one, zero = hits[0][name] & seen, hits[1][name] & seen
                if bool((one & zero).any()):
                    reach.problem = f"several of its units reach the same column of {name!r}"
                    break
                if not torch.equal(one | zero, seen):
                    reach.problem = f"what reaches {name!r} depends on the data"
                    break
                numbers[reach.writer][name] += one.long() << bit
    for reach in reaches:
        for name, seen in reach.seen.items():
            reach.columns[name] = torch.where(seen, numbers[reach.writer][name], -1)


def _groups(reaches: Sequence[_Reach]) -> list[list[_Reach]]:
    """Writers that share a column of some layer, together; in order of their first writer."""
    together = DisjointSet(reach.writer for reach in reaches)
    owner: dict[tuple[str, int], str] = {}
    for reach in reaches:
        for name, units in reach.columns.items():
            for column in torch.nonzero(units >= 0).flatten().tolist():
                together.merge(owner.setdefault((name, column), reach.writer), reach.writer)
    groups: dict[str, list[_Reach]] = {}
    for reach in reaches:
        groups.setdefault(together[reach.writer], []).append(reach)
    return list(groups.values())


def _gate(net: nn.Module, group: Sequence[_Reach]) -> Gate:
    """One gate from the writers that belong together; units that share a column are one unit."""
    same = DisjointSet((reach.writer, unit) for reach in group for unit in range(reach.size))
    owner: dict[tuple[str, int], tuple[str, int]] = {}
    for reach in group:
        for name, units in reach.columns.items():
            for column, own_number in enumerate(units.tolist()):
                if own_number >= 0:
                    unit = (reach.writer, own_number)
                    same.merge(owner.setdefault((name, column), unit), unit)
    number: dict[Any, int] = {}
    own = {}
    for reach in group:
        roots = [same[reach.writer, unit] for unit in range(reach.size)]
        numbers = [number.setdefault(root, len(number)) for root in roots]
        own[reach.writer] = torch.tensor(numbers, device="cpu")
    spans: dict[str, Tensor] = {}
    for reach in group:
        for name, units in reach.columns.items():
            mapped = torch.where(units >= 0, own[reach.writer][units.clamp(min=0)], -1)
            spans[name] = torch.maximum(spans[name], mapped) if name in spans else mapped

    def span(name: str, units: Tensor) -> Span:
        layer = net.get_submodule(name)
        return Span(name, units, 1 if is_channelwise(layer) else groups_of(layer))

    readers = {name for name in spans if is_reader(net.get_submodule(name))}
    selects = {name for name in spans if isinstance(net.get_submodule(name), Select)}
    return Gate(
        name=group[0].writer,
        size=len(number),
        writers=tuple(span(reach.writer, own[reach.writer][reach.blocks]) for reach in group),
        readers=tuple(span(name, units) for name, units in spans.items() if name in readers),
        channelwise=tuple(
            span(name, units) for name, units in spans.items() if name not in readers | selects
        ),
        selects=tuple(span(name, units) for name, units in spans.items() if name in selects),
    )


def _feature_gate(net: nn.Module, layer: str) -> Gate:
    modules = dict(net.named_modules())
    if not isinstance(modules.get(layer), nn.Linear):
        dense = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"input_features names {layer!r}, which is no nn.Linear of the network; "
            f"those are {', '.join(dense) or 'none'}"
        )
    size = num_columns(modules[layer])
    return Gate(f"{layer}_input", size, readers=(Span(layer, torch.arange(size, device="cpu")),))


def find_gates(
    net: nn.Module,
    example_input: Any,
    input_features: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Gates:
    """Find the gates of a network: every set of units that noise can multiply and pruning remove.

    A set of units is gated if every path from it ends in input columns of readers (dense layers
    and convolutions), and if removing units was proven to change nothing: random theta with zeros,
    float64, masked network against shrunk one. An operation that loses NaN (a comparison, a count)
    hides a path from the first of these; the second has to find it on the example.

    Args:
        net: any network; it is not changed.
        example_input: an input that it can be called on: a tensor, a tuple of positional arguments
            or a mapping of named arguments (see `call`). A smaller input takes less time.
        input_features: names of dense layers whose input columns shall each be a unit of its own
            (pixels, flattened features).
        ignore: names of dense, convolutional or embedding layers that the network does not call on
            the example, and that shall not matter. Without it such a layer forbids all gates: it
            might read any unit.

    Returns:
        A list of gates in the order of data flow. Its attribute `left_alone` maps the layers that
        are not prunable to the reason.

    Raises:
        ValueError: `input_features` names no dense layer, one twice, or one that is not called;
            `ignore` names no such layer; or the network cannot be copied or called on the input.
    """
    if len(set(input_features)) < len(input_features):
        raise ValueError(f"input_features names a layer twice: {', '.join(input_features)}")
    features = [_feature_gate(net, layer) for layer in input_features]
    layers = _matrices(net)
    for name in ignore:
        if name not in layers:
            raise ValueError(
                f"ignore names {name!r}, which is no dense, convolutional or embedding layer of "
                f"the network{did_you_mean(name, layers)}"
            )
    x = convert(example_input, torch.float32, torch.device("cpu"))
    training_paths = False
    probe = _record(net, x, training_paths)
    if probe.uncalled:
        try:
            other = _record(net, x, training_paths=True)
        except ValueError:
            other = probe
        if len(other.uncalled) < len(probe.uncalled):
            probe, training_paths = other, True
    uncalled = [name for name in probe.uncalled if name not in ignore]
    order = list(probe.clean)
    for layer in input_features:
        if layer not in order:
            raise ValueError(f"input_features names {layer!r}, which is not called on its own")
    left_alone = {name: _why_unknown(net, name, probe) for name in layers if name not in order}
    if uncalled:
        # What is not called on the example may be called on another input, and read any unit.
        why = f"{uncalled[0]!r} is not called on the example and might read it"
        return Gates([], left_alone | dict.fromkeys(order, why), order)
    with torch.no_grad():
        reaches = _measure(probe.net, probe, x, order)
    left_alone |= {reach.writer: reach.problem for reach in reaches if reach.problem is not None}
    gates = [_gate(probe.net, group) for group in _groups([r for r in reaches if not r.problem])]
    del probe
    # A gate on features stands just before the layer that reads them.
    place = {name: index for index, name in enumerate(order)}
    gates.sort(key=lambda gate: place[gate.writers[0].layer])
    for gate in features:
        layer = gate.readers[0].layer
        position = sum(place[g.writers[0].layer] < place[layer] for g in gates if g.writers)
        gates.insert(position + sum(not g.writers for g in gates[:position]), gate)
    proven: list[Gate] = []
    if gates:
        Proof(net, x, training_paths).keep(gates, proven, left_alone)
    return Gates(proven, left_alone, order)


def _matrices(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if is_matrix(module)]


def _record(net: nn.Module, x: Any, training_paths: bool) -> _Probe:
    """Call a copy of the network once, and watch its layers."""
    try:
        probe = _Probe(copy_for_measurement(net, torch.float32, training_paths))
        with torch.no_grad(), repeatable(torch.float32), probe:
            output = call(probe.net, convert(x, torch.float32))
        list(tensors_of(output))
    except Exception as error:  # a network's own code may raise anything
        raise ValueError(
            f"{type(net).__name__} cannot be called on the example input ({_shapes(x)}): "
            f"{first_line(error)}"
        ) from error
    return probe


def _shapes(x: Any) -> str:
    try:
        return ", ".join(str(list(tensor.shape)) for tensor in tensors_of(x)) or "no tensor"
    except TypeError:
        return f"a {type(x).__name__}"


def _why_unknown(net: nn.Module, name: str, probe: _Probe) -> str:
    """Why a matrix layer was not seen at work."""
    if name in probe.uncalled:
        return "is not called on the example"
    parent = net.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "belongs to an nn.MultiheadAttention, see separate_attention"
    if "weight" not in net.get_submodule(name)._parameters:
        return "computes its weight"
    return "has a weight that is used elsewhere"
