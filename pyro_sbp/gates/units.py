"""What becomes of the units of a gate, also as an attribute of the network that lost the others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.deprecation import renamed_attribute, with_new_names
from pyro_sbp.gates.nested import same

__all__ = ["Units", "forget_units", "set_units", "units_of"]


@dataclass(frozen=True, eq=False)
class Units:
    """What becomes of the units of a gate; both are bool tensors ``[size]``.

    Two are equal if both tensors are.

    Attributes:
        kept: units that carry signal.
        remaining: units that remain in the network. One that remains without being kept is a column
            of zeros, left where a layer could not be cut otherwise: nothing would remain of it, or
            its groups would become uneven.
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
        """Units that are not there any more, bool ``[size]``."""
        return ~self.remaining

    @property
    def zeroed(self) -> Tensor:
        """Units that remain as a column of zeros, bool ``[size]``."""
        return self.remaining & ~self.kept

    def to_dict(self) -> dict[str, Any]:
        """The number of all units, and the indices of those kept and zeroed, for JSON."""
        kept, zeroed = (torch.nonzero(mask).flatten().tolist() for mask in (self.kept, self.zeroed))
        return {"total": len(self.kept), "kept": kept, "zeroed": zeroed}

    def then(self, later: Units) -> Units:
        """These units after another cut, which knew only those that this one had left."""
        kept, remaining = torch.zeros_like(self.kept), torch.zeros_like(self.remaining)
        kept[self.remaining], remaining[self.remaining] = later.kept, later.remaining
        return Units(self.kept & kept, remaining)


def set_units(small: nn.Module, units: Mapping[str, Units]) -> None:
    """Set the attribute `units` of a network: what became of the units of every gate.

    A network that has an attribute of this name itself keeps it, and a `UserWarning` says so.

    Args:
        small: the network that remains.
        units: by gate of the network that was cut.
    """
    forget_units(small)
    if hasattr(small, "units"):
        warnings.warn(
            f"{type(small).__name__} has an attribute 'units' of its own, which stays as it is; "
            "the pruned network does not say which units it has kept",
            stacklevel=3,
        )
    else:
        small.units = dict(units)  # type: ignore[assignment]  # a plain attribute of a module


def units_of(small: nn.Module) -> dict[str, Units] | None:
    """What `set_units` has set; None for other networks."""
    found = vars(small).get("units")
    if isinstance(found, dict) and all(isinstance(unit, Units) for unit in found.values()):
        return found
    return None


def forget_units(net: nn.Module) -> None:
    """Delete what `set_units` has set, for a network that is cut further."""
    if units_of(net) is not None:
        del net.units
