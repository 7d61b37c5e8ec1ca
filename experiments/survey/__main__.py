"""Survey a collection of networks, each in a separate process with a time limit.

python -m pyro_sbp.experiments.survey COLLECTION [NAME ...] [--against torch-pruning]
    [--before DIRECTORY]

Networks have random weights, and nothing is downloaded. Networks and comparisons that have a record
are not measured again, so that an interrupted survey can be continued, and comparisons can be
added.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyro_sbp.errors import RequestError, did_you_mean, first_line
from pyro_sbp.experiments.extra import check_installed
from pyro_sbp.experiments.survey import records
from pyro_sbp.experiments.survey.collections import COLLECTIONS, collection
from pyro_sbp.experiments.survey.other_version import version_of
from pyro_sbp.experiments.survey.processes import Comparisons, measured

__all__ = ["main"]


def _line(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name}: {row['failed']}"
    blocks = [sum(values) for values in zip(*row["blocks"].values(), strict=True)]
    inside = f", {blocks[1] / blocks[0]:.0%} inside blocks" if blocks else ""
    gated, layers = row["attention"]
    other = row.get("torch_pruning", {})
    theirs = other.get("failed", f"{other.get('max_rel_diff', -1):.0e}") if other else ""
    before = row.get("before", {})
    earlier = before.get("failed", f"{before.get('cpu_seconds')} s") if before else ""
    return (
        f"{name}: {row['gates']} gates of {row['units']:,} units, {row['macs_left']:.0%} of MACs "
        f"left{inside}, {gated} of {layers} attention layers, difference "
        f"{row['max_rel_diff']:.0e}, {row['cpu_seconds']} s"
        + (f"; Torch-Pruning: {theirs}" if theirs else "")
        + (f"; before: {earlier}" if earlier else "")
    )


def _names(collected: str, asked: Sequence[str]) -> list[str]:
    names = list(collection(collected).names())
    for name in asked:
        if name not in names:
            close = did_you_mean(name, names)
            raise RequestError(f"the collection {collected} has no network {name!r}{close}")
    return list(asked) or names


def _survey(options: argparse.Namespace) -> None:
    directory = Path(options.output_dir)
    libraries = collection(options.collection).LIBRARIES
    for library in libraries:
        if find_spec(library.replace("-", "_")) is None:
            raise RequestError(f"this needs {library}: pip install {library}")
    comparisons = Comparisons(options.against == "torch-pruning", options.before)
    fresh = records.new(options.collection, libraries, options.against)
    if records.path_of(options.collection, directory).exists():
        record = records.read(options.collection, directory)
        record["versions"] = {**fresh["versions"], **record["versions"]}
        if options.against:
            record["command"] = fresh["command"]
    else:
        record = fresh
    if options.before:
        version = version_of(options.before)
        if record.setdefault("before", version) != version:
            raise RequestError(
                f"the record compares with version {record['before']}; for another version, use "
                "--output-dir with a new directory"
            )
    for name in _names(options.collection, options.networks):
        found = {} if options.again else record["networks"].get(name, {})
        if "failed" in found or (found and found.keys() >= set(comparisons.keys)):
            continue
        missing = Comparisons(
            comparisons.torch_pruning and "torch_pruning" not in found,
            None if "before" in found else comparisons.before,
        )
        row = measured(options.collection, name, options.limit, missing)
        if found and "failed" in row:
            print(f"{name}: {row['failed']}; its earlier record stays", flush=True)
            continue
        # Seconds are compared only within one run. Other earlier results are kept.
        stays = found if missing.before is None else {"torch_pruning"} & found.keys()
        row |= {key: found[key] for key in stays}
        records.add(record, name, row, directory)
        print(_line(name, row), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m pyro_sbp.experiments.survey", description=__doc__.split("\n")[0]
    )
    parser.add_argument("collection", choices=COLLECTIONS)
    parser.add_argument("networks", nargs="*", help="names; all networks if none is given")
    parser.add_argument(
        "--against", choices=("torch-pruning",), help="library that also cuts the networks"
    )
    parser.add_argument(
        "--before",
        metavar="DIRECTORY",
        help="also run the version of the package in this git checkout, and compare",
    )
    parser.add_argument("--again", action="store_true", help="measure networks that have a record")
    parser.add_argument("--limit", type=float, default=150.0, help="CPU seconds for each network")
    parser.add_argument(
        "--output-dir", default=str(records.DIRECTORY), help="directory of the records"
    )
    options = parser.parse_args(arguments)
    try:
        if options.against:
            check_installed("torch_pruning")
        _survey(options)
    except (RequestError, ModuleNotFoundError) as error:
        parser.error(first_line(error))


if __name__ == "__main__":
    main()
