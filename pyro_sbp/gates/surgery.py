"""Remove units from a network: fold theta into the weights, and delete the units with theta = 0."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.gates.calling import call, evaluating
from pyro_sbp.gates.copies import copy_network, fresh
from pyro_sbp.gates.folding import factors
from pyro_sbp.gates.functions import is_inexact
from pyro_sbp.gates.gate import Gate, Span, check_theta
from pyro_sbp.gates.hooks import drop_broken_hooks
from pyro_sbp.gates.layers import Select, groups_of, resize, resize_tensor
from pyro_sbp.gates.nested import tensors_of
from pyro_sbp.gates.noise import check_no_noise
from pyro_sbp.gates.recurrent import HIDDEN, is_recurrent
from pyro_sbp.gates.sizes import set_sizes
from pyro_sbp.gates.state import undone
from pyro_sbp.gates.units import Units, forget_units

__all__ = [
    "EXACT",
    "cut",
    "readable",
    "relative_difference",
    "remaining_gates",
    "shrink",
    "shrink_in_place",
    "surviving_units",
]

#: The largest `relative_difference` in float64 between the outputs of two networks that count as
#: equal.
EXACT = 1e-10


def _spread(alive: Tensor, span: Span) -> Tensor:
    """Expand the units that are alive to the rows or columns of a span that are alive.

    Rows or columns that belong to no unit are alive.
    """
    return alive[span.units.clamp(min=0)] | (span.units < 0)


def _alive(spans: Sequence[tuple[str, Span]], alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows or columns that are alive, by the keys of the spans.

    A row or column is alive if its units in all gates are alive.

    Args:
        spans: spans of rows, or spans of columns, each with the name of its gate.
        alive: from gate name to the units that are alive, bool ``[units]``.
    """
    found: dict[str, Tensor] = {}
    for gate, span in spans:
        here = _spread(alive[gate], span)
        found[span.key] = found[span.key] & here if span.key in found else here
    return found


def _columns(gates: Sequence[Gate]) -> list[tuple[str, Span]]:
    return [(gate.name, span) for gate in gates for span in gate.readers]


def _selected(gates: Sequence[Gate]) -> list[tuple[str, Span]]:
    return [(gate.name, span) for gate in gates for span in gate.selects]


def _rows(gates: Sequence[Gate]) -> list[tuple[str, Span]]:
    return [(gate.name, span) for gate in gates for span in (*gate.writers, *gate.channelwise)]


def _read(gate: Gate, columns: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Tensor:
    """The units of a gate that reach a column that is alive, bool ``[size]``.

    In a layer with groups, a column counts only if a row of its group is alive.

    Args:
        gate: the gate.
        columns, rows: the columns and rows that are alive, from `_alive`.
    """
    read = torch.zeros(gate.size, dtype=torch.bool, device="cpu")
    for span in gate.readers:
        living = columns.get(span.key, torch.ones_like(span.units, dtype=torch.bool))
        if span.groups > 1 and span.layer in rows:
            groups = rows[span.layer].view(span.groups, -1).any(1)
            living = living & groups.repeat_interleave(len(living) // span.groups)
        read[span.units[living & (span.units >= 0)]] = True
    return read


def surviving_units(
    gates: Sequence[Gate],
    theta: Mapping[str, Tensor],
    *,
    min_units: int = 1,
    round_to: int = 1,
    score: Mapping[str, Tensor] | None = None,
) -> dict[str, Units]:
    """Find the units of every gate that remain when the zeros of theta are removed.

    A unit is also removed if no remaining column reads it, for example a channel whose flattened
    features are all removed. An input feature is removed if its channel is removed. This is
    repeated until nothing changes.

    Args:
        gates: the gates.
        theta: from gate name to a tensor ``[units]``. In gates that are not named, theta is not 0.
            Names that are not those of gates are ignored.
        min_units: the smallest number of units of every gate that remain in the network. At least
            one unit always remains.
        round_to: the number of units that remain is a multiple of this, or the size of the gate.
        score: from gate name to a tensor ``[units]``. If more units must remain than theta keeps,
            those with the highest score remain, and first of all those that a remaining column can
            read. By default, the first units have the highest score.

    Returns:
        From gate name to the `Units` of the gate.
    """
    alive = {
        gate.name: theta[gate.name].detach().cpu() != 0
        if gate.name in theta
        else torch.ones(gate.size, dtype=torch.bool, device="cpu")
        for gate in gates
    }
    columns_of, rows_of = _columns(gates), _rows(gates)
    while True:
        columns, rows = _alive(columns_of, alive), _alive(rows_of, alive)
        new = {gate.name: alive[gate.name] & _read(gate, columns, rows) for gate in gates}
        if all(torch.equal(alive[name], new[name]) for name in alive):
            break
        alive = new
    remaining = _remaining(gates, alive, min_units, round_to, score or {})
    return {gate.name: Units(alive[gate.name], remaining[gate.name]) for gate in gates}


def _remaining(
    gates: Sequence[Gate],
    alive: Mapping[str, Tensor],
    min_units: int,
    round_to: int,
    score: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The units that remain: those that are alive, and as many others as are required.

    Others are required by `min_units`, by `round_to`, and by layers whose groups must have the same
    size.

    Args:
        gates, min_units, round_to, score: as for `surviving_units`.
        alive: from gate name to the units that are alive.
    """
    remaining = {name: units.clone() for name, units in alive.items()}
    order = {
        gate.name: score.get(gate.name, -torch.arange(gate.size, device="cpu")).detach().cpu()
        for gate in gates
    }

    def bring_back(gate: Gate, among: Tensor, count: int) -> bool:
        """Keep the best `count` of the removed units in `among`. Return whether there are any."""
        candidates = torch.nonzero(among & ~remaining[gate.name]).flatten()
        best = order[gate.name][candidates].argsort(descending=True, stable=True)[:count]
        remaining[gate.name][candidates[best]] = True
        return len(best) > 0

    changed = True
    while changed:
        changed = False
        for gate in gates:
            count = int(remaining[gate.name].sum())
            least = min(max(count, min_units, 1), gate.size)
            missing = min(-(-least // round_to) * round_to, gate.size) - count
            if missing > 0:
                # Units that a remaining column of another gate could read come first.
                bring_back(gate, readable(gate, gates, remaining), missing)
                missing -= int(remaining[gate.name].sum()) - count
                bring_back(gate, torch.ones(gate.size, dtype=torch.bool, device="cpu"), missing)
                changed = True
        changed |= _even_groups(gates, remaining, bring_back)
    return remaining


def _even_groups(gates: Sequence[Gate], remaining: Mapping[str, Tensor], bring_back: Any) -> bool:
    """Give all remaining groups of every layer the same size, by keeping more units.

    Args:
        gates: the gates.
        remaining: the units that remain, which `bring_back` changes.
        bring_back: keeps a number of units of a gate that are removed.

    Returns:
        Whether more units are kept.
    """
    sides: dict[str, tuple[list[tuple[Gate, Span]], list[tuple[Gate, Span]]]] = {}
    for gate in gates:
        for side, of_gate in enumerate((gate.writers, gate.readers)):
            for span in of_gate:
                if span.groups > 1:
                    sides.setdefault(span.layer, ([], []))[side].append((gate, span))
    changed = False
    for both in sides.values():
        # If the rows or the columns have no gate, all of them remain, and so does every group.
        present = [spans for spans in both if spans]
        counts = [_group_counts(spans, remaining) for spans in present]
        kept = torch.tensor(True, device="cpu")
        if len(counts) > 1:
            kept = (counts[0] > 0) | (counts[1] > 0)
        for spans, count in zip(present, counts, strict=True):
            most = max(1, int(count.max()))
            for group in torch.nonzero(kept & (count < most)).flatten().tolist():
                missing = most - int(count[group])
                for gate, span in spans:
                    among = torch.zeros(gate.size, dtype=torch.bool, device="cpu")
                    units = span.units.view(span.groups, -1)[group]
                    among[units[units >= 0]] = True
                    changed |= bring_back(gate, among, missing)
                    missing = most - int(_group_counts(spans, remaining)[group])
                    if missing <= 0:
                        break
    return changed


def _group_counts(spans: Sequence[tuple[Gate, Span]], remaining: Mapping[str, Tensor]) -> Tensor:
    """The number of rows or columns that remain in every group of a layer, from its spans."""
    (alive,) = _alive([(gate.name, span) for gate, span in spans], remaining).values()
    return alive.view(spans[0][1].groups, -1).sum(1)


def shrink(
    net: nn.Module,
    gates: Sequence[Gate],
    theta: Mapping[str, Tensor],
    example_input: Any,
    units: Mapping[str, Units] | None = None,
) -> nn.Module:
    """Build the smaller network that computes the same function as the network masked by theta.

    Units with theta = 0 are removed: the columns of the readers, then the rows of writers that no
    reader uses any more, and their channels in batch norms and depthwise convolutions. The other
    values of theta are folded into the readers. If a dense layer keeps only some of its input
    features, a `Select` is put before it.

    Args:
        net: the network, which is not changed.
        gates: its gates, from `find_gates`.
        theta: from gate name to a tensor ``[units]``. In gates that are not named, theta is 1.
        example_input: an input of the network, on which the result is called once.
        units: the units that remain, from `surviving_units` with the same theta. The default is
            `surviving_units` with its default arguments.

    Returns:
        A copy of the network with smaller layers. If all units of a gate would be removed, one unit
        remains as a column of zeros. If its forward hooks cannot be called on the smaller layers,
        they are removed, and a `UserWarning` is given.

    Raises:
        ValueError: theta names an unknown gate, or does not have the shape ``[units]``; the network
            cannot be copied; or the noise of a `Pruner` is attached to it.
        Exception: the smaller network cannot be called on `example_input`. Its own error is raised,
            such as a `RuntimeError` of torch.
    """
    check_no_noise(net, "pruned")
    small = copy_network(net)
    shrink_in_place(small, gates, theta, units)
    drop_broken_hooks(small, example_input)
    with torch.no_grad(), undone(small), evaluating(small):
        call(small, fresh(example_input))
    return small


def shrink_in_place(
    net: nn.Module,
    gates: Sequence[Gate],
    theta: Mapping[str, Tensor],
    units: Mapping[str, Units] | None = None,
) -> None:
    """As `shrink`, but in place.

    The result is not called, forward hooks are not removed, and attached noise is not detected.

    Raises:
        ValueError: theta names an unknown gate, or does not have the shape ``[units]``.
    """
    check_theta(gates, theta, cut=True)
    units = surviving_units(gates, theta) if units is None else units
    with torch.no_grad():
        for _, weight, factor in factors(net, gates, theta):
            weight.mul_(factor)
    cut(net, gates, units)


def readable(gate: Gate, gates: Sequence[Gate], alive: Mapping[str, Tensor]) -> Tensor:
    """The units of a gate that a column could read if only the other gates were cut.

    Args:
        gate: the gate.
        gates: all gates.
        alive: from gate name to the units that are alive, bool ``[units]``.

    Returns:
        The units, bool ``[size]``.
    """
    others = _columns([other for other in gates if other is not gate])
    return _read(gate, _alive(others, alive), {})


def cut(net: nn.Module, gates: Sequence[Gate], units: Mapping[str, Units]) -> None:
    """Remove rows and columns, in place.

    The other weights are not changed, except those that the network multiplies by a power of their
    number of columns (`Span.power`). They are rescaled, so that the product does not change. The
    attributes in `Gate.sizes` are set, and the record of an earlier cut (`set_units`) is deleted.

    Args:
        net: the network.
        gates: its gates.
        units: from the name of every gate to its units, from `surviving_units`.
    """
    forget_units(net)
    remaining = {name: unit.remaining for name, unit in units.items()}
    rows = _alive(_rows(gates), remaining)
    # The rows of writers that remain determine which features arrive at a layer. The layer may need
    # only some of them.
    arriving = _alive(_columns([gate for gate in gates if gate.writers]), remaining)
    wanted = _alive(_columns(gates), remaining)
    spans = {span.key: span for _, span in (*_rows(gates), *_columns(gates))}
    for key in {**rows, **wanted}:
        layer, tensor, dim = spans[key].layer, spans[key].tensor, spans[key].dim
        module = net.get_submodule(layer)
        columns = wanted.get(key)
        if columns is not None and spans[key].power:
            _compensate(module, spans[key], columns)
        if tensor == HIDDEN and is_recurrent(module):
            continue  # removed with the rows
        if tensor:
            resize_tensor(module, tensor, dim, _index(rows.get(key)), _index(columns))
            continue
        resize(module, _index(rows.get(layer)), _index(columns))
        if columns is None:
            continue
        arrives = arriving.get(layer, torch.ones_like(columns))
        before = _select_before(net, layer)
        if before is not None:
            # By indices, because a mask cannot index a tensor on the meta device.
            before.index = before.index[torch.nonzero(columns).flatten().to(before.index.device)]
        elif not torch.equal(arrives, columns):
            weight = module.get_parameter("weight")
            select = Select(torch.nonzero(columns[arrives]).flatten().to(weight.device))
            _put(net, layer, nn.Sequential(OrderedDict(select=select, layer=module)))
    for name, arrives in _alive(_selected(gates), remaining).items():
        module = net.get_submodule(name)
        assert isinstance(module, Select)
        module.index = (arrives.cumsum(0) - 1).to(module.index.device)[module.index]
    for gate in gates:
        set_sizes(net, gate, int(remaining[gate.name].sum()))


def _compensate(module: nn.Module, span: Span, columns: Tensor) -> None:
    """Divide a weight by the change of its factor, which depends on the number of columns.

    Args:
        module: the module of the weight.
        span: the columns before the cut.
        columns: the columns that remain, bool.
    """
    weight = getattr(module, span.tensor or "weight")
    weight.data.mul_((len(columns) / max(int(columns.sum()), 1)) ** span.power)


def _select_before(net: nn.Module, layer: str) -> Select | None:
    """The `Select` that an earlier cut has put before a layer, or None."""
    parent, _, leaf = layer.rpartition(".")
    select = getattr(net.get_submodule(parent), "select", None)
    return select if leaf == "layer" and isinstance(select, Select) else None


def remaining_gates(
    small: nn.Module, gates: Sequence[Gate], units: Mapping[str, Units]
) -> list[Gate]:
    """The gates of a network after a cut, computed without measuring it again.

    The gates keep their names and the order of their units. If a layer ``fc1`` has a `Select`
    before it, the spans have its new name ``fc1.layer``.

    Args:
        small: the smaller network, from `shrink` with these units.
        gates: the gates of the network before the cut.
        units: the units of the cut, from `surviving_units`.

    Returns:
        The gates of the smaller network, in the same order.
    """
    remaining = {name: unit.remaining for name, unit in units.items()}
    rows, columns = _alive(_rows(gates), remaining), _alive(_columns(gates), remaining)
    arriving = _alive(_columns([gate for gate in gates if gate.writers]), remaining)
    selected = _alive(_selected(gates), remaining)

    def rest(gate: Gate, span: Span, alive: Mapping[str, Tensor], layer: str = "") -> Span:
        number = remaining[gate.name].cumsum(0) - 1
        old = span.units[alive[span.key]]
        new = torch.where(old >= 0, number[old.clamp(min=0)], -1)
        layer = layer or _present_name(small, span.layer)
        if span.tensor:
            return Span(layer, new, tensor=span.tensor, dim=span.dim, power=span.power)
        # A convolution that now has one channel per group still has rows and columns.
        groups = groups_of(small.get_submodule(layer)) if span.groups > 1 else 1
        return Span(layer, new, groups, power=span.power)

    def carrying(spans: Iterable[Span]) -> tuple[Span, ...]:
        return tuple(span for span in spans if bool((span.units >= 0).any()))

    found = []
    for gate in gates:
        # If the cut has put a Select before a layer, the features that arrive there have a span.
        fresh = [
            rest(gate, span, arriving, f"{span.layer}.select")
            for span in (gate.readers if gate.writers else ())
            if _present_name(small, span.layer) != span.layer
        ]
        found.append(
            Gate(
                gate.name,
                int(remaining[gate.name].sum()),
                readers=carrying(rest(gate, span, columns) for span in gate.readers),
                writers=carrying(rest(gate, span, rows) for span in gate.writers),
                channelwise=carrying(rest(gate, span, rows) for span in gate.channelwise),
                selects=carrying([*(rest(gate, s, selected) for s in gate.selects), *fresh]),
                sizes=gate.sizes,
            )
        )
    return found


def _present_name(small: nn.Module, layer: str) -> str:
    """The name of a layer after a cut, which may have put a `Select` before it."""
    module = small.get_submodule(layer)
    new = isinstance(module, nn.Sequential) and _select_before(small, f"{layer}.layer") is not None
    return f"{layer}.layer" if new else layer


def _index(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else torch.nonzero(mask).flatten()


def _put(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, module)


def relative_difference(expected: Any, actual: Any) -> float:
    """The largest difference between two outputs, relative to the size of the expected output.

    Each tensor is compared on its own scale. The difference of a value is divided by the absolute
    value, or by the typical size of the tensor if this is larger. The typical size is the larger of
    two numbers: the median absolute value of the elements that differ, and the minimum of 1 and the
    largest absolute value.

    The reasons are as follows. If all values of a tensor are smaller than 1, they are compared
    relative to the largest value. In other tensors, dividing by the largest value would hide the
    differences of ordinary values behind one huge value, such as a mask of -1e9. Dividing each
    difference by its own value would turn rounding errors of values near zero into large
    differences.

    The difference is infinite if two tensors have different shapes, if values that are not finite
    are not equal, or if tensors of integers or booleans are not equal. NaN is not equal to
    anything.

    Args:
        expected, actual: tensors, or nested structures of tensors as for `tensors_of`.

    Returns:
        The largest difference over all tensors, 0 or more.

    Raises:
        ValueError: the outputs contain no tensor, or different numbers of tensors.
        TypeError: an output contains an object of an unknown type, as for `tensors_of`.
    """
    pairs = list(zip(tensors_of(expected), tensors_of(actual), strict=True))
    if not pairs:
        raise ValueError("there is no tensor in the output, so nothing can be compared")
    return max(_difference(a.detach(), b.detach()) for a, b in pairs)


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not (is_inexact(a) and is_inexact(b)):
        return 0.0 if a.dtype == b.dtype and torch.equal(a, b) else float("inf")
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    differs = a != b
    if not bool(differs.any()):
        return 0.0
    size = a.abs()
    largest = size.where(size.isfinite(), 0).max()
    a, b, size = a[differs], b[differs], size[differs]
    if not bool((a.isfinite() & b.isfinite()).all()):
        return float("inf")
    typical = size.median().maximum(largest.clamp(max=1))
    return float(((a - b).abs() / size.maximum(typical)).max())
