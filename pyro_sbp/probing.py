"""Find where noise can stand in a network, by measuring which columns each unit reaches.

A NaN put into an output channel of a layer (a writer) shows up in exactly the input columns of the
layers (readers) that the channel reaches, through flatten, concatenation, pooling or sums, whatever
the network's code. Channel numbers are coded in bits, so that 2 log2(channels) passes a writer
tell all of its channels apart: a column that saw exactly one of each bit and its complement is
reached by one channel, whose number the bits spell.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_sbp.errors import first_line
from pyro_sbp.gates import Gate, GatedNetwork, Span, call, convert, tensors_of
from pyro_sbp.layers import (
    CHANNELWISE_FUNCTIONS,
    LINEAR_FUNCTIONS,
    channel_dim,
    is_channelwise,
    is_matrix,
)
from pyro_sbp.surgery import relative_difference, shrink

__all__ = ["Gates", "find_gates"]


class Gates(list[Gate]):
    """A list of gates in the order of data flow; `left_alone` says what is not gated and why."""

    def __init__(self, gates: Iterable[Gate] = (), left_alone: dict[str, str] | None = None):
        super().__init__(gates)
        self.left_alone = dict(left_alone or {})


class _Probe(TorchFunctionMode):
    """Watch the layers of a network, known by their weight or running mean, while it is called.

    The first call caches what every layer answers. In later ones every reader answers with its
    cached output, so that a NaN injected into one layer's output stops at the layers it reaches.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layers: dict[int, tuple[str, nn.Module]] = {}
        for name, module in net.named_modules():
            if is_matrix(module) or is_channelwise(module):
                for key in ("weight", "running_mean"):
                    tensor = getattr(module, key, None)
                    if tensor is not None:
                        self.layers[id(tensor)] = (name, module)
        self.clean: dict[str, list[Tensor]] = {}
        self.columns: dict[str, int] = {}
        self.recording = True

    def start(self, writer: str | None, channels: Tensor | None) -> None:
        """Begin a pass; with a writer, NaN goes into those of its channels that are set."""
        self.recording = writer is None
        self.writer, self.channels = writer, channels
        self.seen: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}

    def _layer(self, args: Any, kwargs: Any) -> tuple[str, nn.Module] | None:
        for value in (*args, *kwargs.values()):
            if id(value) in self.layers:
                return self.layers[id(value)]
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = func in LINEAR_FUNCTIONS or func in CHANNELWISE_FUNCTIONS
        found = self._layer(args, kwargs) if known else None
        if found is None:
            return func(*args, **kwargs)
        name, layer = found
        x: Tensor = args[0] if args else kwargs["input"]
        dim = channel_dim(layer, x)
        hit = x.isnan().movedim(dim, 0).flatten(1).any(1)
        self.seen[name] = self.seen[name] | hit if name in self.seen else hit
        if is_channelwise(layer):
            return func(*args, **kwargs)
        if self.recording:
            out = func(*args, **kwargs)
            self.clean.setdefault(name, []).append(out.clone())
            self.columns[name] = x.shape[dim]
            return out
        index = self.calls.get(name, 0)
        self.calls[name] = index + 1
        out = self.clean[name][index].clone()
        if name == self.writer:
            out.movedim(channel_dim(layer, out), 0)[self.channels] = torch.nan
        return out


@dataclass
class _Reach:
    """Where the units of one writer arrive."""

    writer: str
    size: int
    columns: dict[str, Tensor]  # reader or channel-wise layer -> unit of each channel, or -1
    problem: str | None = None


def _codes(size: int) -> Tensor:
    """Patterns ``[2 * bits, size]``: which channels each pass sets, every bit and its opposite."""
    bits = max(1, (size - 1).bit_length())
    numbers = torch.arange(size)
    ones = torch.stack([(numbers >> bit) & 1 for bit in range(bits)]).bool()
    return torch.cat([ones, ~ones])


def _measure(net: nn.Module, probe: _Probe, x: Any, writer: str) -> _Reach:
    layer = net.get_submodule(writer)
    size = layer.weight.shape[0]
    patterns = _codes(size)
    bits = len(patterns) // 2
    reach = _Reach(writer, size, {})
    seen: dict[str, list[Tensor]] = {}
    for channels in patterns:
        probe.start(writer, channels)
        with probe:
            output = call(net, x)
        if any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors_of(output)):
            reach.problem = "reaches an output of the network"
            return reach
        for name, hit in probe.seen.items():
            seen.setdefault(name, []).append(hit)
    for name, hits in seen.items():
        if len(hits) != len(patterns):
            reach.problem = f"layer {name!r} is not called every time"
            return reach
        ones, zeros = torch.stack(hits).split(bits)
        if not bool((ones | zeros).any()):
            continue
        reached = (ones | zeros).any(0)
        if bool((ones & zeros).any()):
            reach.problem = f"several of its units reach the same column of {name!r}"
            return reach
        numbers = (ones.long() << torch.arange(bits)[:, None]).sum(0)
        reach.columns[name] = torch.where(reached, numbers, -1)
    readers = [name for name in reach.columns if is_matrix(net.get_submodule(name))]
    if not readers:
        reach.problem = "no layer reads it"
    return reach


class _UnionFind:
    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}

    def find(self, item: Any) -> Any:
        self.parent.setdefault(item, item)
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def join(self, a: Any, b: Any) -> None:
        self.parent[self.find(b)] = self.find(a)


def _groups(reaches: Sequence[_Reach]) -> list[list[_Reach]]:
    """Writers that share a channel of some layer, together; in order of their first writer."""
    union = _UnionFind()
    owner: dict[tuple[str, int], str] = {}
    for reach in reaches:
        union.find(reach.writer)
        for name, units in reach.columns.items():
            for column in torch.nonzero(units >= 0).flatten().tolist():
                union.join(owner.setdefault((name, column), reach.writer), reach.writer)
    groups: dict[str, list[_Reach]] = {}
    for reach in reaches:
        groups.setdefault(union.find(reach.writer), []).append(reach)
    return list(groups.values())


def _gate(net: nn.Module, group: Sequence[_Reach]) -> Gate:
    """One gate from the writers that belong together; units that share a column are one unit."""
    union = _UnionFind()
    owner: dict[tuple[str, int], tuple[str, int]] = {}
    for reach in group:
        for row in range(reach.size):
            union.find((reach.writer, row))
        for name, units in reach.columns.items():
            for column, row in enumerate(units.tolist()):
                if row >= 0:
                    unit = (reach.writer, row)
                    union.join(owner.setdefault((name, column), unit), unit)
    number: dict[Any, int] = {}
    rows = {
        reach.writer: torch.tensor(
            [
                number.setdefault(union.find((reach.writer, row)), len(number))
                for row in range(reach.size)
            ]
        )
        for reach in group
    }
    spans: dict[str, Tensor] = {}
    for reach in group:
        for name, units in reach.columns.items():
            mapped = torch.where(units >= 0, rows[reach.writer][units.clamp(min=0)], -1)
            spans[name] = torch.maximum(spans[name], mapped) if name in spans else mapped
    matrix = {name for name in spans if is_matrix(net.get_submodule(name))}
    return Gate(
        name=group[0].writer,
        size=len(number),
        writers=tuple(Span(name, units) for name, units in rows.items()),
        readers=tuple(Span(name, units) for name, units in spans.items() if name in matrix),
        channelwise=tuple(Span(name, units) for name, units in spans.items() if name not in matrix),
    )


def _feature_gate(net: nn.Module, layer: str) -> Gate:
    modules = dict(net.named_modules())
    if not isinstance(modules.get(layer), nn.Linear):
        dense = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"input_features names {layer!r}, which is no nn.Linear of the network; "
            f"those are {', '.join(dense) or 'none'}"
        )
    size = modules[layer].in_features
    return Gate(f"{layer}_input", size, readers=(Span(layer, torch.arange(size)),))


def _prove(net: nn.Module, gates: Sequence[Gate], x: Any) -> str | None:
    """Why a network shrunk by random theta differs from the masked one; None if it does not."""
    generator = torch.Generator().manual_seed(0)
    theta = {}
    for gate in gates:
        values = 0.5 + torch.rand(gate.size, generator=generator, dtype=torch.float64)
        values[torch.randperm(gate.size, generator=generator)[: -(-gate.size // 3)]] = 0
        theta[gate.name] = values
    try:
        with torch.no_grad():
            masked = GatedNetwork(net, gates)(x, theta)
            small = call(shrink(net, gates, theta, x), x)
        difference = relative_difference(masked, small)
    except Exception as error:  # a network's own code may raise anything
        return f"cutting it fails: {first_line(error)}"
    if not difference <= 1e-10:
        return f"cutting it changes the output by {difference:.1e}"
    return None


def find_gates(net: nn.Module, example_input: Any, input_features: Sequence[str] = ()) -> Gates:
    """Find the gates of a network: every set of units that noise can multiply and pruning remove.

    A set of units is gated if every path from it ends in input columns of readers (dense layers
    and convolutions), and if removing units was proven to change nothing: random theta with zeros,
    float64, masked network against shrunk one.

    Args:
        net: any network; it is not changed.
        example_input: an input that it can be called on: a tensor, a tuple of inputs or a dict of
            named ones.
        input_features: names of dense layers whose input columns shall each be a unit of its own
            (pixels, flattened features).

    Returns:
        A list of gates in the order of data flow. Its attribute `left_alone` maps the layers that
        are not gated to the reason.

    Raises:
        ValueError: `input_features` names no dense layer.
    """
    features = [_feature_gate(net, layer) for layer in input_features]
    probed = copy.deepcopy(net).cpu().double().eval()
    x = convert(example_input, torch.float64, torch.device("cpu"))
    probe = _Probe(probed)
    probe.start(None, None)
    with torch.no_grad(), probe:
        call(probed, x)
    order = list(probe.columns)
    left_alone = {}
    reaches = []
    with torch.no_grad():
        for writer in order:
            reach = _measure(probed, probe, x, writer)
            if reach.problem:
                left_alone[writer] = reach.problem
            else:
                reaches.append(reach)
    gates = [_gate(probed, group) for group in _groups(reaches)]
    # A gate on features stands just before the layer that reads them.
    place = {name: index for index, name in enumerate(order)}
    gates.sort(key=lambda gate: place[gate.writers[0].layer])
    for gate in features:
        layer = gate.readers[0].layer
        position = sum(place[g.writers[0].layer] < place[layer] for g in gates if g.writers)
        gates.insert(position + sum(not g.writers for g in gates[:position]), gate)
    if _prove(probed, gates, x) is not None:
        # Something cannot be cut: find out what, one gate more at a time.
        proven: list[Gate] = []
        for gate in gates:
            problem = _prove(probed, [*proven, gate], x)
            if problem:
                left_alone[gate.name] = problem
            else:
                proven.append(gate)
        gates = proven
    return Gates(gates, left_alone)
