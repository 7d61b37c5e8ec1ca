"""Remove units from a network: fold theta in, delete what is zero, leave an ordinary network."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.gates import Gate, Span, call, fold, tensors_of
from pyro_sbp.layers import resize

__all__ = ["Select", "Units", "relative_difference", "shrink", "surviving_units"]


class Select(nn.Module):
    """Select features of the last dimension of the input: the gather before a dense layer."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., features]`` to ``[..., len(index)]``."""
        return x.index_select(-1, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)} features"


@dataclass(frozen=True)
class Units:
    """What becomes of the units of a gate; both are bool tensors ``[size]``.

    Attributes:
        kept: units that carry signal.
        physical: units that remain in the network. One that remains without being kept is a column
            of zeros, left where nothing would remain of a layer.
    """

    kept: Tensor
    physical: Tensor

    @property
    def zeroed(self) -> Tensor:
        """Units that remain as a column of zeros, bool ``[size]``."""
        return self.physical & ~self.kept


def _alive_columns(
    gates: Sequence[Gate], alive: Mapping[str, Tensor], only: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Which columns of every reader are alive: those whose gates all have their unit alive."""
    columns: dict[str, Tensor] = {}
    for gate in gates:
        if only is None or gate.name in only:
            for span in gate.readers:
                column = _spread(alive[gate.name], span)
                columns[span.layer] = columns.get(span.layer, torch.tensor(True)) & column
    return columns


def _spread(alive: Tensor, span: Span) -> Tensor:
    """Alive units as alive columns; a column without a unit is alive."""
    return alive[span.units.clamp(min=0)] | (span.units < 0)


def _read(gate: Gate, columns: Mapping[str, Tensor]) -> Tensor:
    """Which units of a gate arrive in a living column, bool ``[size]``."""
    read = torch.zeros(gate.size, dtype=torch.bool)
    for span in gate.readers:
        living = columns.get(span.layer, torch.tensor(True))
        read[span.units[living & (span.units >= 0)]] = True
    return read


def surviving_units(gates: Sequence[Gate], theta: Mapping[str, Tensor]) -> dict[str, Units]:
    """Which units remain where the zeros of theta are removed, gate by gate.

    A unit is also gone if no living column is left that reads it (a channel all of whose flattened
    features are removed), and a feature if its channel is, to a fixed point.
    """
    alive = {
        gate.name: theta[gate.name].detach().cpu() != 0
        if gate.name in theta
        else torch.ones(gate.size, dtype=torch.bool)
        for gate in gates
    }
    while True:
        columns = _alive_columns(gates, alive)
        new = {}
        for gate in gates:
            new[gate.name] = alive[gate.name] & _read(gate, columns)
        if all(torch.equal(alive[name], new[name]) for name in alive):
            break
        alive = new
    physical = {name: units.clone() for name, units in alive.items()}
    for gate in gates:
        if not alive[gate.name].any():
            # One unit stays, of those that are still joined to what stays of the gates before.
            left = _read(gate, _alive_columns([g for g in gates if g is not gate], physical))
            physical[gate.name][int(left.int().argmax())] = True
    return {gate.name: Units(alive[gate.name], physical[gate.name]) for gate in gates}


def shrink(
    net: nn.Module, gates: Sequence[Gate], theta: Mapping[str, Tensor], example_input: Any
) -> nn.Module:
    """Make the plain, smaller network that computes what the network masked by theta computes.

    Zeros of theta are removed: the columns of the readers, then the rows of writers that no reader
    takes any more and their channels in batch norms and depthwise convolutions. The rest of theta
    is folded into the readers. Where a layer keeps only some features of what flows into it, a
    `Select` stands before it.

    Args:
        net: the network; it is not changed.
        gates: its gates, from `find_gates`.
        theta: from gate name to a tensor ``[units]``; a gate that is not named keeps its units.
        example_input: an input of the network, on which the result is called once.

    Returns:
        A copy of the network with smaller layers and no hooks. A layer whose units would all be
        gone keeps one of them as a column of zeros.

    Raises:
        ValueError: theta names no gate of `gates`, or has the wrong length.
        RuntimeError: the smaller network cannot be called on `example_input`.
    """
    folded = fold(net, gates, theta)
    units = surviving_units(gates, theta)
    alive = {name: unit.physical for name, unit in units.items()}
    small = copy.deepcopy(net)
    with torch.no_grad():
        for name, weight in folded.items():
            small.get_parameter(name).copy_(weight)
    rows: dict[str, Tensor] = {}
    for gate in gates:
        for span in (*gate.writers, *gate.channelwise):
            kept = _spread(alive[gate.name], span)
            rows[span.layer] = rows.get(span.layer, torch.tensor(True)) & kept
    # Removing rows upstream decides which columns still arrive; of those, some are wanted.
    arriving = _alive_columns(gates, alive, [gate.name for gate in gates if gate.writers])
    wanted = _alive_columns(gates, alive)
    for layer in {**rows, **wanted}:
        module = small.get_submodule(layer)
        columns = wanted.get(layer)
        index = None if columns is None else torch.nonzero(columns).flatten()
        resize(module, _index(rows.get(layer)), index)
        arrives = arriving.get(layer, torch.ones_like(columns) if columns is not None else None)
        if columns is not None and not torch.equal(arrives, columns):
            select = Select(torch.nonzero(columns[arrives]).flatten().to(module.weight.device))
            _put(small, layer, nn.Sequential(OrderedDict(select=select, layer=module)))
    with torch.no_grad():
        training = {name: module.training for name, module in small.named_modules()}
        call(small.eval(), example_input)
        for name, module in small.named_modules():
            module.training = training[name]
    return small


def _index(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else torch.nonzero(mask).flatten()


def _put(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, module)


def relative_difference(expected: Any, actual: Any) -> float:
    """The largest difference of two outputs, relative to the largest value of the first."""
    pairs = list(zip(tensors_of(expected), tensors_of(actual), strict=True))
    with torch.no_grad():
        # Not Python's `max`, which loses a NaN.
        largest = float(torch.stack([a.abs().max() for a, _ in pairs]).max())
        difference = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())
    return difference / largest if largest > 0 else difference
