"""The tables of docs/survey.md and docs/own_network.md, from the records of the survey."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.rows import markdown
from pyro_sbp.experiments.survey.collections import COLLECTIONS, collection
from pyro_sbp.experiments.survey.records import DIRECTORY, path_of, read

__all__ = ["against", "blocks", "by_block", "families", "seconds", "slowest", "summary"]

_Row = Mapping[str, Any]
#: The largest difference of outputs with which a cut is called exact.
EXACT = 1e-10
#: The largest number of reasons in a cell. Those of most parameters come first.
_REASONS = 3
#: The number of networks in a table of the slowest ones.
_SLOWEST = 8


def _finished(record: _Row) -> dict[str, _Row]:
    return {name: row for name, row in record["networks"].items() if "failed" not in row}


def _range(values: Iterable[float], spec: str) -> str:
    """The smallest and the largest of some numbers as text."""
    texts = [format(value, spec) for value in sorted(values)]
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _reasons(rows: Sequence[_Row]) -> str:
    """Why layers of some networks are not prunable, with their mean share of the parameters."""
    shares: Counter[str] = Counter()
    for row in rows:
        for why, (_, share) in row["not_prunable"].items():
            shares[why] += share / len(rows)
    return ", ".join(f"{why} {share:.0%}" for why, share in shares.most_common(_REASONS))


def families(collected: str, *names: str, directory: Path = DIRECTORY) -> str:
    """The networks of a collection by family.

    Args:
        collected: the collection.
        names: the families; all if none is given.
        directory: the directory of the records.
    """
    record = read(collected, directory)
    groups: dict[str, list[_Row]] = {}
    for row in _finished(record).values():
        groups.setdefault(row["family"], []).append(row)
    for name in names:
        if name not in groups:
            raise RequestError(f"the record of {collected} has no family {name!r}")
    rows = [
        (
            family,
            str(len(found)),
            _range([row["gates"] for row in found], ","),
            _range([row["macs_left"] for row in found], ".0%"),
            format(max(row["max_rel_diff"] for row in found), ".0e"),
            _range([row["cpu_seconds"] for row in found], ".0f"),
            _reasons(found),
        )
        for family, found in sorted(groups.items())
        if not names or family in names
    ]
    rows += [
        (name, "1", "", "", "", "", row["failed"])
        for name, row in record["networks"].items()
        if "failed" in row and not names
    ]
    head = (
        *("family", "networks", "gates", "MACs left", "largest difference", "CPU seconds"),
        "not prunable, share of the parameters",
    )
    return f"{markdown(head, rows)}\n\n{_count(collected, record)} networks; {_made(record)}"


def _count(collected: str, record: _Row) -> str:
    """The number of networks of a collection that have been measured, as text."""
    number, most = len(record["networks"]), len(collection(collected).names())
    return str(number) if number == most else f"{number} of {most}"


def _made(record: _Row) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"`{record['command']}`; {versions}; {record['machine']}."


def _share(row: _Row) -> float:
    before, after = (sum(values) for values in zip(*row["blocks"].values(), strict=True))
    return after / before


def blocks(*collections: str, directory: Path = DIRECTORY) -> str:
    """The MACs that remain inside the blocks of networks that have blocks."""
    rows = []
    for collected in collections:
        for name, row in _finished(read(collected, directory)).items():
            if row["blocks"]:
                gated, layers = row["attention"]
                heads = f"{gated} of {layers}" if layers else "-"
                rows.append(
                    (
                        *(name, str(len(row["blocks"])), heads, f"{_share(row):.0%}"),
                        *(f"{row['macs_left']:.0%}", f"{row['max_rel_diff']:.0e}"),
                    )
                )
    head = ("network", "blocks", "attention with gated heads", "MACs left in the blocks")
    return markdown((*head, "in the network", "difference"), rows)


def by_block(collected: str, *names: str, directory: Path = DIRECTORY) -> str:
    """The MACs left in each block of some networks."""
    found = _finished(read(collected, directory))
    for name in names:
        if name not in found:
            raise RequestError(f"the record of {collected} has no network {name!r}")
    rows = [
        (name, block, f"{before:,}", f"{after / before:.0%}")
        for name in names
        for block, (before, after) in found[name]["blocks"].items()
    ]
    return markdown(("network", "block", "MACs", "left"), rows)


def summary(*, directory: Path = DIRECTORY) -> str:
    """A line for each collection that has a record."""
    rows = []
    for collected in COLLECTIONS:
        if not path_of(collected, directory).exists():
            continue
        record = read(collected, directory)
        found = list(_finished(record).values())
        seconds = [row["cpu_seconds"] for row in found]
        rows.append(
            (
                collected,
                _count(collected, record),
                str(len(record["networks"]) - len(found)),
                f"{median([row['macs_left'] for row in found]):.0%}",
                f"{max(row['max_rel_diff'] for row in found):.0e}",
                f"{median(seconds):.1f}",
                f"{max(seconds):.0f}",
            )
        )
    head = ("collection", "networks", "not finished", "MACs left, median", "largest difference")
    return markdown((*head, "CPU seconds of find_gates, median", "most"), rows)


def against(*, directory: Path = DIRECTORY) -> str:
    """How many cuts of Torch-Pruning are exact, inexact, or fail, for each collection."""
    rows = []
    for collected in COLLECTIONS:
        if not path_of(collected, directory).exists():
            continue
        found = [
            row for row in _finished(read(collected, directory)).values() if "torch_pruning" in row
        ]
        ours = Counter(_outcome(row) for row in found)
        theirs = Counter(_outcome(row["torch_pruning"]) for row in found)
        if found:
            rows.append(
                (
                    collected,
                    *(str(n) for n in (len(found), ours["exact"], theirs["exact"])),
                    *(str(n) for n in (theirs["inexact"], theirs["failed"])),
                )
            )
    head = ("collection", "networks", "exact here", "exact by Torch-Pruning", "inexact", "failed")
    return markdown(head, rows)


def _outcome(row: _Row) -> str:
    if "failed" in row:
        return "failed"
    return "exact" if row["max_rel_diff"] <= EXACT else "inexact"


def _both(collected: str, directory: Path) -> tuple[str, dict[str, tuple[_Row, _Row]]]:
    """The other version of a record, and the rows of this and of that version.

    Raises:
        RequestError: the record has no comparison with another version.
    """
    record = read(collected, directory)
    rows = record["networks"].items()
    both = {name: (row, row["before"]) for name, row in rows if "before" in row}
    if not both:
        raise RequestError(f"the record of {collected} has no comparison; use --before DIRECTORY")
    return record["before"], both


def _seconds(row: _Row) -> str:
    return str(row["failed"]) if "failed" in row else f"{row['cpu_seconds']:.1f}"


def seconds(*collections: str, directory: Path = DIRECTORY) -> str:
    """The CPU seconds of `find_gates` in collections, with another version and now.

    The medians are over the networks that both versions have finished.
    """
    rows = []
    for collected in collections:
        version, found = _both(collected, directory)
        finished = [
            (before["cpu_seconds"], now["cpu_seconds"])
            for now, before in found.values()
            if "failed" not in before
        ]
        medians = [f"{median(values):.1f}" for values in zip(*finished, strict=True)]
        faster = f"{median(before / now for before, now in finished):.2f}"
        unfinished = str(len(found) - len(finished))
        rows.append((collected, version, str(len(found)), unfinished, *medians, faster))
    head = ("collection", "version before", "networks", "not finished before", "median before, s")
    return markdown((*head, "median now, s", "times faster, median"), rows)


def slowest(*collections: str, directory: Path = DIRECTORY) -> str:
    """The networks of collections for which `find_gates` takes most CPU seconds."""
    rows = []
    for collected in collections:
        found = _both(collected, directory)[1]
        by_seconds = sorted(found.items(), key=lambda item: -item[1][0]["cpu_seconds"])
        for name, (now, before) in by_seconds[:_SLOWEST]:
            gates = [f"{row['gates']:,}" if "gates" in row else "" for row in (before, now)]
            rows.append((f"{collected} {name}", _seconds(before), _seconds(now), *gates))
    return markdown(("network", "before, s", "now, s", "gates before", "gates now"), rows)
