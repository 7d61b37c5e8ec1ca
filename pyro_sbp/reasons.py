"""The reasons why layers are not prunable, as lines of text.

This module imports no torch, because the command line imports it before its commands run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["MOST", "lines_not_prunable", "reasons_by_share", "with_share"]

#: The largest number of layers that a message or a table of the command line names.
MOST = 6


def with_share(reason: str, share: Sequence[float] | None) -> str:
    """Why a layer is not prunable, and its share of the network, if known.

    Args:
        reason: the reason.
        share: the share of the parameters, and that of the MACs if it is known.
    """
    if share is None:
        return reason
    kinds = ("parameters", "MACs")
    shares = ", ".join(f"{x:.1%} of the {kind}" for x, kind in zip(share, kinds, strict=False))
    return f"{reason} ({shares})"


def reasons_by_share(
    not_prunable: Mapping[str, str],
    shares: Mapping[str, Sequence[float]],
    most: int | None = None,
    where: str = "",
    form: str = "{}: {}",
) -> list[str]:
    """For each layer that is not prunable its name and the reason, the largest layers first.

    Args:
        not_prunable: from name to reason. The name of the network itself is "".
        shares: from name to the share of the parameters, and that of the MACs if it is known.
        most: the largest number of layers that are named; by default all. The last element then
            has the number of the others.
        where: where all layers are named, such as "summary.json".
        form: the format of an element, with a name and a reason.
    """
    names = sorted(not_prunable, key=lambda name: -shares.get(name, (0.0,))[0])
    found = [
        form.format(name or "the network", with_share(not_prunable[name], shares.get(name)))
        for name in names[:most]
    ]
    if len(names) > len(found):
        found.append(f"and {len(names) - len(found)} more" + (f", in {where}" if where else ""))
    return found


def lines_not_prunable(
    not_prunable: Mapping[str, str],
    shares: Mapping[str, Sequence[float]],
    most: int | None = None,
    where: str = "",
) -> list[str]:
    """The lines about layers that are not prunable, for tables of the command line.

    Args:
        not_prunable, shares, most, where: as for `reasons_by_share`.
    """
    return reasons_by_share(not_prunable, shares, most, where, "not prunable: {}, {}")
