"""The units of a gate that pruning keeps and removes, and their record in a pruned network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.deprecation import renamed_attribute, with_new_names
from pyro_sbp.gates.nested import same

__all__ = ["Units", "forget_units", "set_units", "units_as_dicts", "units_of"]


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a gate that pruning has kept and removed.

    Two instances are equal if both tensors are equal.

    Attributes:
        kept: the units with a theta that is not zero and a column that reads them, bool ``[size]``.
        remaining: the units that remain in the network, bool ``[size]``. A unit that remains but is
            not kept is a column of zeros. It remains because the layer cannot be cut otherwise (the
            layer would be empty, or its groups would have different sizes), or because `min_units`
            or `round_to` of `surviving_units` requires more units.
    """

    kept: Tensor
    remaining: Tensor

    physical = renamed_attribute("Units", "physical", "remaining")

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(with_new_names(state, {"physical": "remaining"}))

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    def __hash__(self) -> int:
        return hash((len(self.kept), int(self.kept.sum()), int(self.remaining.sum())))

    @property
    def removed(self) -> Tensor:
        """The units that were removed from the network, bool ``[size]``."""
        return ~self.remaining

    @property
    def zeroed(self) -> Tensor:
        """The units that remain as columns of zeros, bool ``[size]``."""
        return self.remaining & ~self.kept

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON: the number of units (``total``), and the indices of the units that
        are kept and of those that are zeroed (``kept``, ``zeroed``)."""
        kept, zeroed = (torch.nonzero(mask).flatten().tolist() for mask in (self.kept, self.zeroed))
        return {"total": len(self.kept), "kept": kept, "zeroed": zeroed}

    def then(self, later: Units) -> Units:
        """Combine these units with those of a later cut, which saw only the remaining units.

        Args:
            later: the units of the later cut, ``[remaining units]``.

        Returns:
            The result of both cuts, with the size of these units.
        """
        kept, remaining = torch.zeros_like(self.kept), torch.zeros_like(self.remaining)
        kept[self.remaining], remaining[self.remaining] = later.kept, later.remaining
        return Units(self.kept & kept, remaining)


def set_units(small: nn.Module, units: Mapping[str, Units]) -> None:
    """Record the units of every gate in the attribute `units` of a pruned network.

    If the network already has an attribute of this name that is not such a record, it is not
    changed, and a `UserWarning` is given.

    Args:
        small: the pruned network.
        units: from gate name to the units of the gate.
    """
    forget_units(small)
    if not units:
        return  # a network without gates; an empty record could not be told from its own attribute
    if hasattr(small, "units"):
        warnings.warn(
            f"{type(small).__name__} already has an attribute 'units', which is not changed; "
            "the pruned network does not record which units it has kept",
            stacklevel=3,
        )
    else:
        small.units = dict(units)  # type: ignore[assignment]  # a plain attribute of a module


def units_of(small: nn.Module) -> dict[str, Units] | None:
    """The value that `set_units` has set, or None if there is none."""
    found = vars(small).get("units")
    # `set_units` sets no empty dictionary, so this is an attribute of the network itself.
    if isinstance(found, dict) and found and all(isinstance(u, Units) for u in found.values()):
        return found
    return None


def units_as_dicts(small: nn.Module) -> dict[str, dict[str, Any]] | None:
    """From gate name to the dictionary of its units (`Units.to_dict`), for the units that
    `set_units` has set. None if there are none."""
    units = units_of(small)
    return None if units is None else {gate: unit.to_dict() for gate, unit in units.items()}


def forget_units(net: nn.Module) -> None:
    """Delete the attribute that `set_units` has set, if there is one.

    The record does not hold for a network that is cut again.
    """
    if units_of(net) is not None:
        del net.units
