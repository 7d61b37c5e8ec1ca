"""The reasons why layers are not prunable, as lines of text.

This module imports no torch, because the command line imports it before its commands run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["lines_not_prunable", "reasons_by_share", "with_share"]

#: The largest number of reasons in a message.
_MOST = 8


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


def lines_not_prunable(
    not_prunable: Mapping[str, str],
    shares: Mapping[str, Sequence[float]],
    most: int | None = None,
    more: str = "",
) -> list[str]:
    """A line for each layer that is not prunable, those with most parameters first.

    Args:
        not_prunable: from name to reason.
        shares: from name to the share of the parameters, and that of the MACs if it is known.
        most: the largest number of layers that are named; by default all.
        more: where the other layers are named, such as ", in summary.json".
    """
    names = sorted(not_prunable, key=lambda name: -shares.get(name, (0.0,))[0])
    lines = [
        f"not prunable: {name}, {with_share(not_prunable[name], shares.get(name))}"
        for name in names[:most]
    ]
    if len(names) > len(lines):
        lines.append(f"and {len(names) - len(lines)} more{more}")
    return lines


def reasons_by_share(not_prunable: Mapping[str, str], shares: Mapping[str, float]) -> str:
    """One line with the layers and parameters that are not prunable, the largest ones first.

    Args:
        not_prunable: from name to reason.
        shares: from name to the share of the parameters, from `shares`.
    """
    names = sorted(not_prunable, key=lambda name: -shares.get(name, 0.0))
    lines = [
        f"{name or 'the network'}: {not_prunable[name]} "
        f"({shares.get(name, 0.0):.0%} of the parameters)"
        for name in names[:_MOST]
    ]
    if len(names) > _MOST:
        lines.append(f"and {len(names) - _MOST} more")
    return "; ".join(lines)
