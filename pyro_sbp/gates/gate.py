"""Gates: where multiplicative noise enters a network.

The noise of a gate is applied at the inputs of the readers of its units, not at the output of their
writer. A reader is linear in its input columns. Therefore theta can be folded into its weight, and
theta_c = 0 is equivalent to deleting column c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_sbp.gates.nested import same

__all__ = ["Gate", "Size", "Span", "check_theta"]


@dataclass(frozen=True, eq=False)
class Span:
    """Which unit each row or column of one layer belongs to.

    Two spans are equal if all attributes are equal.

    Attributes:
        layer: the name of the module.
        units: the number of the unit of each row or column, int64 ``[rows]`` or ``[columns]``, and
            -1 for a row or column that belongs to no unit of the gate.
        groups: the number of groups of the layer. All groups that remain must keep the same number
            of rows or columns.
        tensor: the name of a parameter or buffer of the module, if the rows or columns are those of
            this tensor and not of the weight of the layer. In a recurrent layer, ``"weight_hh"``
            stands for the columns of all weights that read the hidden state.
        dim: the dimension of `tensor` along which the rows or columns lie.
        power: the power of the number of columns by which the network multiplies the weight in
            every call, such as -0.5 for an equalized learning rate.
    """

    layer: str
    units: Tensor
    groups: int = 1
    tensor: str = ""
    dim: int = 0
    power: float = 0.0
    _on: dict[torch.device, tuple[Tensor, bool]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    def __hash__(self) -> int:
        return hash((self.layer, len(self.units), self.groups))

    @property
    def key(self) -> str:
        """The name of the layer, or ``LAYER.TENSOR[DIM]`` for a span of one tensor.

        For a tensor of the network itself, it is ``TENSOR[DIM]``.

        Spans of rows with the same key describe the same rows, and spans of columns with the same
        key describe the same columns.
        """
        return f"{_joined(self.layer, self.tensor)}[{self.dim}]" if self.tensor else self.layer

    def expand(self, values: Tensor) -> Tensor:
        """Expand a value per unit to a value per row or column.

        Args:
            values: ``[..., units]``.

        Returns:
            ``[..., rows]`` or ``[..., columns]``, with 1 where there is no unit.
        """
        if values.device not in self._on:
            units = self.units.to(values.device)
            whole = torch.equal(self.units, torch.arange(len(self.units), device="cpu"))
            self._on[values.device] = (units, whole)
        units, whole = self._on[values.device]
        if whole and len(units) == values.shape[-1]:
            return values
        padded = torch.cat([values, values.new_ones(*values.shape[:-1], 1)], dim=-1)
        return padded.index_select(-1, units % padded.shape[-1])


@dataclass(frozen=True)
class Size:
    """An integer attribute of a module that depends on the number of units, such as `num_heads`.

    Attributes:
        module: the name of the module.
        attribute: the name of the attribute: an integer, or a tuple or a list of integers. It is
            ``config.NAME`` for an integer in the configuration of the module.
        place: the index of the integer in the tuple or list, or None for a single integer.
        per_unit: the integer divided by the number of units.
    """

    module: str
    attribute: str
    place: int | None
    per_unit: int


@dataclass(frozen=True, repr=False)
class Gate:
    """A set of units that are multiplied by one noise variable theta of shape ``[size]``.

    A unit consists of one or more rows of the writers and one or more columns of the readers. For
    example, an attention head is a block of rows in each of the layers of queries, keys and values,
    and a block of columns of the output layer.

    Attributes:
        name: the name of the gate, and of its Pyro sample site.
        size: the number of units.
        readers: the layers that take the units as input columns.
        writers: the layers that produce the units as output rows. A gate on input features has no
            writers.
        channelwise: the layers in between that process every channel, or every group of channels,
            separately (batch norms, depthwise convolutions, group norms), and the parameters and
            buffers with one element or slice per unit.
        selects: the `Select` modules in between, which earlier cuts put before a reader, with the
            unit of each of their input features.
        sizes: the attributes of modules that depend on the number of units.
    """

    name: str
    size: int
    readers: tuple[Span, ...]
    writers: tuple[Span, ...] = ()
    channelwise: tuple[Span, ...] = ()
    selects: tuple[Span, ...] = ()
    sizes: tuple[Size, ...] = ()

    def __repr__(self) -> str:
        parts = [repr(self.name), f"{self.size} units"]
        for kind in ("writers", "readers", "channelwise", "selects"):
            layers = ", ".join(span.key for span in getattr(self, kind))
            parts += [f"{kind}: {layers}"] if layers else []
        names = ", ".join(dict.fromkeys(_joined(s.module, s.attribute) for s in self.sizes))
        parts += [f"sizes: {names}"] if names else []
        return f"Gate({'; '.join(parts)})"


def _joined(module: str, name: str) -> str:
    """The full name of an attribute of a module, whose name is "" if it is the network itself."""
    return f"{module}.{name}" if module else name


def check_theta(gates: Sequence[Gate], theta: Mapping[str, Tensor], *, cut: bool = False) -> None:
    """Check the names and shapes of theta.

    Args:
        gates: the gates.
        theta: from gate name to a tensor whose last dimension is the units of the gate.
        cut: whether units with theta = 0 are to be removed, so that every theta must have one
            dimension.

    Raises:
        ValueError: theta names an unknown gate, or has a wrong shape.
    """
    sizes = {gate.name: gate.size for gate in gates}
    for name, value in theta.items():
        if name not in sizes:
            raise ValueError(f"theta names the gate {name!r}; the gates are {', '.join(sizes)}")
        units = sizes[name]
        if value.ndim == 0 or value.shape[-1] != units or (cut and value.ndim > 1):
            others = "" if cut else f", [batch, {units}] or [draws, batch, {units}]"
            raise ValueError(
                f"theta of gate {name!r} has shape {list(value.shape)}; expected [{units}]{others}"
            )
