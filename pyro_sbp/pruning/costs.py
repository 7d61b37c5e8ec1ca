"""The costs of the units of a network, in multiply-accumulates (MACs)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyro_sbp.gates.copies import copy_network
from pyro_sbp.gates.gate import Gate, Span
from pyro_sbp.gates.layers import groups_of, num_columns, num_rows, weight_of
from pyro_sbp.gates.recurrent import HIDDEN, is_recurrent, recurrent_weights
from pyro_sbp.gates.surgery import cut, surviving_units
from pyro_sbp.pruning.macs import macs_by_module, original_name

__all__ = ["Costs", "UnitCosts", "keep_probability", "scales_by_cost"]

#: Spans, each with the name of its gate.
_Spans = Sequence[tuple[str, Span]]


class Costs(Protocol):
    """The costs of the units of a network, such as `UnitCosts`."""

    def relative(self) -> dict[str, float]:
        """By gate, the cost of a unit divided by the mean cost of all units."""


def keep_probability(snr: Tensor) -> Tensor:
    """SNR^2 / (1 + SNR^2): the probability that a unit is kept, from its posterior.

    It is the probability P(c) of the distribution on {0, c} (a removed and a kept unit) that has
    the posterior's E[theta] and Var[theta]: P(c) = E[theta]^2 / E[theta^2]. SNR >= 1 is P >= 1/2.

    Args:
        snr: the signal-to-noise ratio of every unit, of any shape, in [0, inf].
    """
    return 1 / (1 + snr.reciprocal().square())  # the square of a large SNR would overflow


@dataclass(frozen=True)
class _Layer:
    """A layer whose rows or columns belong to units.

    Attributes:
        macs: the MACs of one pair of a row and a column, over all positions.
        rows, columns: the numbers of its rows and columns.
        groups: the number of groups. A row is multiplied with the columns of its group only.
        writes, reads: the spans of its rows, and of its columns.
    """

    macs: float
    rows: int
    columns: int
    groups: int
    writes: _Spans
    reads: _Spans

    @property
    def all(self) -> float:
        """The MACs if all units are kept."""
        return self.macs * self.rows * self.columns / self.groups

    def expected(self, keep: Mapping[str, Tensor]) -> Tensor:
        """Expected MACs, a scalar."""
        rows, columns = _there(self.writes, self.rows, keep), _there(self.reads, self.columns, keep)
        pairs = self._by_group(rows) @ self._by_group(columns)
        # A row and a column of the same unit are kept together with probability p. The product
        # above has p^2.
        for gate, write, read in self._shared():
            p = keep[gate]
            rows = _there([x for x in self.writes if x[0] != gate], self.rows, keep)
            columns = _there([x for x in self.reads if x[0] != gate], self.columns, keep)
            both = self._by_unit(write, rows, p) * self._by_unit(read, columns, p)
            pairs = pairs + (both @ (p - p * p)).sum()
        return self.macs * pairs

    def _shared(self) -> list[tuple[str, Span, Span]]:
        reads = dict(self.reads)
        return [(gate, write, reads[gate]) for gate, write in self.writes if gate in reads]

    def _by_group(self, values: Tensor) -> Tensor:
        return values.view(self.groups, -1).sum(1)

    def _by_unit(self, span: Span, values: Tensor, p: Tensor) -> Tensor:
        """Sums ``[groups, units]`` over the rows, or columns, of each group and unit."""
        group = torch.arange(len(values), device="cpu") // (len(values) // self.groups)
        carries = span.units >= 0
        place = (group * len(p) + span.units)[carries]
        return (
            p.new_zeros(self.groups * len(p)).index_add(0, place, values[carries]).view(-1, len(p))
        )


@dataclass(frozen=True)
class _Products:
    """Products that a module computes outside of its layers, such as those inside attention.

    Attributes:
        macs: the MACs of all these products.
        shares: from the name of each gate on which the products depend to the share of the products
            that is removed if all units of the gate are removed.
    """

    macs: float
    shares: Mapping[str, float]

    def expected(self, keep: Mapping[str, Tensor]) -> Tensor:
        """Expected MACs, a scalar: exact if they are proportional to the units of one gate."""
        left = torch.tensor(self.macs, dtype=torch.float64, device="cpu")
        for gate, share in self.shares.items():
            left = left * (1 - share * (1 - keep[gate].mean()))
        return left


def _there(spans: _Spans, size: int, keep: Mapping[str, Tensor]) -> Tensor:
    """The probability that each row or column remains. It remains if all of its units remain."""
    there = torch.ones(size, dtype=torch.float64, device="cpu")
    for gate, span in spans:
        there = there * span.expand(keep[gate])
    return there


class UnitCosts:
    """The costs of the units of a network in MACs, measured in one call.

    The MACs of a dense layer or convolution are the sum over all pairs of a row and a column that
    are multiplied. In a layer with groups, these are the pairs within each group. A module can also
    compute products outside of its layers, such as those inside attention. To find how these depend
    on a gate, they are counted again in a copy of the network in which half of the units of the
    gate are removed. Operations that do not depend on any unit have constant MACs.

    Args:
        net: the network, dense or pruned. It is called, and is not changed.
        gates: its gates, from `find_gates` or `remaining_gates`.
        example_input: an input of the network. The MACs are those of one call on it.
    """

    def __init__(self, net: nn.Module, gates: Sequence[Gate], example_input: Any) -> None:
        self.sizes = {gate.name: gate.size for gate in gates}
        writes: dict[str, list[tuple[str, Span]]] = {}
        reads: dict[str, list[tuple[str, Span]]] = {}
        for gate in gates:
            # Tensors between layers are not part of any product.
            between = (span for span in gate.channelwise if not span.tensor)
            for span in (*gate.writers, *between):
                writes.setdefault(span.layer, []).append((gate.name, span))
            for span in gate.readers:
                reads.setdefault(span.layer, []).append((gate.name, span))
        macs, rest = _counted(net, example_input), 0.0
        self._terms: list[_Layer | _Products] = []
        for name in dict.fromkeys([*writes, *reads]):
            cost = macs.pop(original_name(net, name), 0.0)
            if cost:  # not batch norms
                parts = _parts(
                    net.get_submodule(name), cost, writes.get(name, ()), reads.get(name, ())
                )
                self._terms += parts
                rest += cost - sum(part.all for part in parts)
        outside = _outside_of_layers(net, gates, example_input, macs)
        self._terms += outside.values()
        self._rest = rest + sum(count for name, count in macs.items() if name not in outside)

    def expected(self, keep: Mapping[str, Tensor]) -> float:
        """Expected MACs of the network, if every unit remains with its own probability.

        With the probabilities 0 and 1 these are the MACs of the network that has exactly the units
        with probability 1. Pruning can keep more units (at least one in every gate, and the same
        number in every group) and can remove units that no layer reads any more. Pass
        `Units.remaining` for the MACs of a pruned network.

        Args:
            keep: from gate name to probabilities ``[units]`` in [0, 1]. A gate that is not named
                keeps all its units.

        Raises:
            ValueError: `keep` has an unknown gate, a tensor of the wrong shape, or a value outside
                of [0, 1].
        """
        return float(self._expected(self._checked(keep)))

    def _checked(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The probabilities of all units, on the CPU, in float64."""
        values = {name: value.detach().cpu().double() for name, value in keep.items()}
        for name, value in values.items():
            if name not in self.sizes:
                raise ValueError(f"keep names {name!r}; the gates are {', '.join(self.sizes)}")
            if value.shape != (self.sizes[name],):
                raise ValueError(
                    f"keep of gate {name!r} has shape {list(value.shape)}; "
                    f"expected [{self.sizes[name]}]"
                )
            if not bool(((value >= 0) & (value <= 1)).all()):
                raise ValueError(f"keep of gate {name!r} has a value outside of [0, 1]")
        return {**self._all(), **values}

    def _slopes(self, keep: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The expected MACs, and the loss of MACs if a unit is removed, by gate, ``[units]``."""
        if not self._terms:
            return self._rest, {name: torch.zeros_like(value) for name, value in keep.items()}
        values = {name: value.clone().requires_grad_() for name, value in keep.items()}
        with torch.enable_grad():
            # The expectation is linear in the probability of each unit, so its slope is the loss of
            # MACs.
            whole = self._expected(values)
            slopes = torch.autograd.grad(whole, list(values.values()), materialize_grads=True)
        return float(whole.detach()), dict(zip(values, slopes, strict=True))

    def expected_under(self, snr: Mapping[str, Tensor]) -> float:
        """Expected MACs under a posterior, with the probabilities of `keep_probability`.

        Args:
            snr: from gate name to the signal-to-noise ratios of its units, ``[units]``.
        """
        return self.expected({name: keep_probability(value) for name, value in snr.items()})

    def per_unit(self, keep: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """MACs that the network loses if one unit is removed and all others remain.

        Args:
            keep: the probabilities with which the other units remain, as for `expected`; by default
                all remain.

        Returns:
            By gate, the mean over its units, weighted by their probabilities.

        Raises:
            ValueError: as for `expected`.
        """
        values = self._checked(keep or {})
        _, slopes = self._slopes(values)
        return {name: float(_mean(slopes[name], values[name])) for name in self.sizes}

    def relative(self, keep: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """`per_unit`, divided by its mean over all units of all gates, weighted by `keep`.

        Raises:
            ValueError: the MACs of no unit are known, or as for `expected`.
        """
        return self.expected_and_relative(keep or {})[1]

    def expected_and_relative(self, keep: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
        """The values of `expected` and `relative`, in about the time of one of them."""
        values = self._checked(keep)
        expected, slopes = self._slopes(values)
        costs = {name: float(_mean(slopes[name], values[name])) for name in self.sizes}
        mean = float(_mean(*(torch.cat([x[n] for n in self.sizes]) for x in (slopes, values))))
        if not mean > 0:
            raise ValueError(
                "no unit has MACs, so units cannot be weighted by their MACs; use macs_weight 0"
            )
        return expected, {name: cost / mean for name, cost in costs.items()}

    def _all(self) -> dict[str, Tensor]:
        return {
            name: torch.ones(size, dtype=torch.float64, device="cpu")
            for name, size in self.sizes.items()
        }

    def _expected(self, keep: Mapping[str, Tensor]) -> Tensor:
        whole = torch.tensor(self._rest, dtype=torch.float64, device="cpu")
        for term in self._terms:
            whole = whole + term.expected(keep)
        return whole


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of values; without any weight, their mean."""
    total = weights.sum()
    return (values * weights).sum() / total if total > 0 else values.mean()


def _counted(net: nn.Module, example_input: Any) -> dict[str, float]:
    """The MACs of every module, without those of modules inside it, by its name in the dense
    network."""
    macs: dict[str, float] = {}
    for name, count in macs_by_module(net, example_input).items():
        if count:
            name = original_name(net, name) if name else name
            macs[name] = macs.get(name, 0.0) + count
    return macs


def _outside_of_layers(
    net: nn.Module, gates: Sequence[Gate], example_input: Any, macs: Mapping[str, float]
) -> dict[str, _Products]:
    """The products in modules that depend on the units of gates with layers inside these modules.

    Args:
        net, gates, example_input: as for `UnitCosts`.
        macs: the MACs of every module, except layers whose rows or columns belong to units.
    """
    inside = {
        name: [gate for gate in gates if gate.size > 1 and _is_inside(gate, net, name)]
        for name, count in macs.items()
        if count > 0
    }
    shares: dict[str, dict[str, float]] = {}
    for together in _apart(inside.values()):
        theta = {
            gate.name: torch.arange(gate.size, device="cpu") >= gate.size // 2 for gate in together
        }
        units = surviving_units(gates, theta)
        small = copy_network(net)
        with torch.no_grad():
            cut(small, gates, units)
        left = _counted(small, example_input)
        for name, of_module in inside.items():
            for gate in of_module:
                gone = 1 - float(units[gate.name].remaining.double().mean())
                fewer = macs[name] - left.get(name, 0.0)
                if gate.name in theta and gone > 0 and fewer > 0:
                    shares.setdefault(name, {})[gate.name] = fewer / macs[name] / gone
    return {name: _Products(macs[name], of_gates) for name, of_gates in shares.items()}


def _is_inside(gate: Gate, net: nn.Module, module: str) -> bool:
    """Whether a layer of a gate is a module, or is inside it."""
    names = (original_name(net, span.layer) for span in (*gate.writers, *gate.readers))
    return any(not module or f"{name}.".startswith(f"{module}.") for name in names)


def _apart(groups: Iterable[Sequence[Gate]]) -> list[list[Gate]]:
    """Divide the gates into sets that contain at most one gate of each group."""
    by_name = [{gate.name: gate for gate in group} for group in groups]
    gates = {name: gate for group in by_name for name, gate in group.items()}
    sets: list[dict[str, Gate]] = []
    for name, gate in gates.items():
        beside = {other for group in by_name if name in group for other in group}
        for chosen in sets:
            if not beside & chosen.keys():
                chosen[name] = gate
                break
        else:
            sets.append({name: gate})
    return [list(chosen.values()) for chosen in sets]


def _parts(module: nn.Module, macs: float, writes: _Spans, reads: _Spans) -> list[_Layer]:
    """The matrix products of a module: one, unless it is recurrent or has weights outside of
    layers.
    """
    if is_recurrent(module):
        rows = num_rows(module)
        products = [
            (num_columns(module), recurrent_weights(module, hidden=False), ""),
            (rows, recurrent_weights(module, hidden=True), HIDDEN),
        ]
        total = sum(weights for _, weights, _ in products)
        return [
            _layer(macs * weights / total, rows, columns, 1, writes, _of(tensor, reads))
            for columns, weights, tensor in products
        ]
    own = [p.numel() for p in module.parameters(recurse=False) if p.ndim > 1]
    parts = []
    for tensor in dict.fromkeys(span.tensor for _, span in (*writes, *reads)):
        here = _of(tensor, writes), _of(tensor, reads)
        if tensor:
            share = getattr(module, tensor).numel() / sum(own)
            rows, columns = (len(spans[0][1].units) if spans else 1 for spans in here)
            parts.append(_layer(macs * share, rows, columns, 1, *here))
        else:
            share = 1 if len(own) < 2 else weight_of(module).numel() / sum(own)
            sizes = num_rows(module), num_columns(module), groups_of(module)
            parts.append(_layer(macs * share, *sizes, *here))
    return parts


def _of(tensor: str, spans: _Spans) -> _Spans:
    return [(gate, span) for gate, span in spans if span.tensor == tensor]


def _layer(
    macs: float, rows: int, columns: int, groups: int, writes: _Spans, reads: _Spans
) -> _Layer:
    return _Layer(macs * groups / (rows * columns), rows, columns, groups, writes, reads)


def scales_by_cost(
    kl_scale: Mapping[str, float], costs: Costs, macs_weight: float
) -> dict[str, float]:
    """The weights of the KL divergence of the gates, increased by the costs of their units.

    The weight of a unit with average costs is multiplied by 1 + `macs_weight`. No weight becomes
    smaller.

    Args:
        kl_scale: the weights without costs, by gate.
        costs: the costs of the units.
        macs_weight: the weight of the costs. With 0, `kl_scale` is returned unchanged.

    Raises:
        ValueError: raised by `costs.relative`, if units have no costs.
    """
    if not macs_weight:
        return dict(kl_scale)
    relative = costs.relative()
    return {name: scale * (1 + macs_weight * relative[name]) for name, scale in kl_scale.items()}
