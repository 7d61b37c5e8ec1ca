"""Keep a smallest number of units in every gate, and multiples of a number of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.surgery import readable, surviving_units

__all__ = ["UnitMask"]


class UnitMask:
    """The units to keep, by gate, which `extend` extends.

    Args:
        gates, round_to, min_units: as for `choose_units`.
        mask: from gate name to the units that reach the threshold, bool ``[units]``.
        score: from gate name to the scores of the units, ``[units]``.
        usable: from gate name to the units whose theta is not 0, bool ``[units]``.

    Attributes:
        mask: from gate name to the units to keep, bool ``[units]``.
    """

    def __init__(
        self,
        gates: Sequence[Gate],
        mask: Mapping[str, Tensor],
        score: Mapping[str, Tensor],
        usable: Mapping[str, Tensor],
        round_to: int,
        min_units: int,
    ) -> None:
        self.mask = dict(mask)
        self._gates, self._score, self._usable = gates, score, usable
        self._round_to, self._min_units = round_to, min_units

    def extend(self) -> None:
        """Keep the best of the other units too, until every gate has the number of units that
        `round_to` and `min_units` require."""
        self._extend_each()
        if self._extend_jointly():
            self._extend_each()

    def _extend_each(self) -> None:
        """Extend gate by gate, by units that the other gates supply already."""
        for gate in self._gates:
            name, mask = gate.name, self.mask
            kept = int(surviving_units(self._gates, mask)[name].kept.sum())
            wanted = min(self._rounded_up(max(kept, self._min_units)), gate.size)
            possible = readable(gate, self._gates, mask) & ~mask[name]
            if wanted > kept and bool(possible.any()):
                candidates = torch.where(possible, self._score[name].double(), -torch.inf)
                best = candidates.argsort(descending=True, stable=True)[: wanted - kept]
                mask[name] = self._with(name, *best[possible[best]].tolist())

    def _extend_jointly(self) -> bool:
        """Keep the minimum number of units in gates whose units depend on each other.

        A unit can only be kept if other gates keep the units that it needs: a channel needs one of
        its features, and a column of a grouped layer needs a row of its group. Each restored unit
        therefore also restores the best units of the other gates that it needs.

        Returns:
            Whether units were restored.
        """
        changed = False
        for gate in self._gates:
            count = int(self._kept()[gate.name].sum())
            if count >= self._least(gate.name):
                continue
            wanted = min(self._rounded_up(self._min_units), gate.size)
            while count < wanted and (unit := self._next_unit(gate)) is not None:
                self._restore(gate, unit)
                changed, count = True, int(self._kept()[gate.name].sum())
        return changed

    def _rounded_up(self, units: int) -> int:
        return -(-units // self._round_to) * self._round_to

    def _least(self, name: str) -> int:
        """The smallest number of units of a gate."""
        return min(self._min_units, int(self._usable[name].sum()))

    def _kept(
        self, free: Sequence[str] = (), changed: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The units that are kept if the gates in `free` keep all that are usable, and those in
        `changed` the units that it gives."""
        usable = self._usable
        masks = {**self.mask, **{name: usable[name] for name in free}, **(changed or {})}
        alive = {name: units & usable[name] for name, units in masks.items()}
        return {name: units.kept for name, units in surviving_units(self._gates, alive).items()}

    def _best_first(self, name: str, among: Tensor) -> list[int]:
        units = torch.nonzero(among).flatten()
        order = self._score[name][units].argsort(descending=True, stable=True)
        return [int(unit) for unit in units[order]]

    def _with(self, name: str, *units: int) -> Tensor:
        """The mask of a gate with more units."""
        more = self.mask[name].clone()
        more[list(units)] = True
        return more

    def _others(self, gate: Gate) -> list[str]:
        return [other.name for other in self._gates if other is not gate]

    def _next_unit(self, gate: Gate) -> int | None:
        """The best unit that can be kept, with as few other gates changed as possible."""
        now, others = self._kept(), self._others(gate)
        short = [name for name in others if int(now[name].sum()) < self._least(name)]
        for free in (short, others):
            possible = self._kept([*free, gate.name])[gate.name] & ~now[gate.name]
            if found := self._best_first(gate.name, possible):
                return found[0]
        return None

    def _restore(self, gate: Gate, unit: int) -> None:
        """Keep a unit, and the best units of other gates that it needs."""
        self.mask[gate.name] = self._with(gate.name, unit)
        free = self._others(gate)
        while free:
            name = free.pop(0)
            if self._kept(free)[gate.name][unit]:
                continue
            # Consider only what this unit needs, not the other units of the gate.
            alone = torch.zeros_like(self.mask[gate.name])
            alone[unit] = True
            needed = self._kept([name, *free], {gate.name: alone})[name] & ~self.mask[name]
            units = self._best_first(name, needed)
            enough = (
                other
                for other in units
                if self._kept(free, {name: self._with(name, other)})[gate.name][unit]
            )
            first = next(enough, None)
            self.mask[name] = self._with(name, *(units if first is None else [first]))
