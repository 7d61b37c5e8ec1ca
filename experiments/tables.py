"""Rebuild every table and figure of README.md and docs/ from the records of `experiments/results/`.

python -m pyro_sbp.experiments.tables [--check]

A table is between the lines `<!-- table: NAME -->` and `<!-- end -->` of a page. Some names have
arguments, as in `<!-- table: recursion lenet5 -->`. A figure is drawn again if its numbers have
changed. To draw a figure again in any case, delete its file.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

from pyro_sbp.errors import RequestError, did_you_mean
from pyro_sbp.experiments import (
    ablation,
    budget_tables,
    criteria,
    frontier,
    method_tables,
    minilm_tables,
    network_tables,
    prior_figure,
)
from pyro_sbp.experiments.rows import Record, read_records
from pyro_sbp.experiments.survey import tables as survey_tables
from pyro_sbp.training.files import write_text

__all__ = ["OF_OTHER_RECORDS", "OF_RUNS", "main", "rebuilt"]

ROOT = Path(__file__).parents[1]

#: Functions that make a table from the records of runs, and the words after the name of the table.
OF_RUNS: dict[str, Callable[..., str]] = {
    "network": network_tables.network,
    "headline": network_tables.headline,
    "baselines": network_tables.baselines,
    "calibration": network_tables.calibration,
    "speed": network_tables.speed,
    "commands": network_tables.commands,
    "compare": method_tables.compare,
    "recursion": method_tables.recursion,
    "random-labels": method_tables.random_labels,
    "sparse-vd": method_tables.sparse_vd,
    "sparse-vd-seeds": method_tables.sparse_vd_seeds,
    "sparse-vd-thresholds": method_tables.sparse_vd_thresholds,
    "sparse-vd-units": method_tables.sparse_vd_units,
    "recipes": method_tables.recipes,
    "settings": method_tables.settings,
}
#: Functions that make a table from other records, which they read, and the words after its name.
OF_OTHER_RECORDS: dict[str, Callable[..., str]] = {
    "ablation": ablation.table,
    "criteria": criteria.table,
    "budget-speedups": budget_tables.speedups,
    "budget-errors": budget_tables.error_budgets,
    "budget-costs": budget_tables.costs,
    "budget-layers": budget_tables.layers,
    "budget-variants": budget_tables.variants,
    "budget-int8": budget_tables.int8,
    "budget-commands": budget_tables.commands,
    "minilm": minilm_tables.results,
    "minilm-units": minilm_tables.units,
    "minilm-speed": minilm_tables.speed,
    "survey": survey_tables.summary,
    "survey-families": survey_tables.families,
    "survey-blocks": survey_tables.blocks,
    "survey-by-block": survey_tables.by_block,
    "survey-torch-pruning": survey_tables.against,
    "survey-seconds": survey_tables.seconds,
    "survey-slowest": survey_tables.slowest,
}

_BEGIN = re.compile(r"<!--\s*table:\s*(.*?)\s*-->\s*")
_END = re.compile(r"<!--\s*end\s*-->\s*")


def _made(words: str, records: Sequence[Record]) -> str:
    """The table with a name and arguments."""
    name, *arguments = words.split() or [""]
    names = [*OF_RUNS, *OF_OTHER_RECORDS]
    if name not in names:
        close = did_you_mean(name, names) or f"; expected one of {', '.join(names)}"
        raise RequestError(f"no table is called {name!r}{close}")
    table = partial(OF_RUNS[name], records) if name in OF_RUNS else OF_OTHER_RECORDS[name]
    try:
        inspect.signature(table).bind(*arguments)
    except TypeError as error:
        raise RequestError(f"wrong words after its name: {error}") from error
    return table(*arguments)


def rebuilt(page: str, text: str, records: Sequence[Record]) -> tuple[str, list[str]]:
    """A page with its tables rebuilt from the records.

    Args:
        page: the name of the page, for messages.
        text: the content of the page.

    Returns:
        The new content of the page, and a line for every table that was out of date.

    Raises:
        RequestError: a table is unknown, has no end line, or needs a record that does not exist.
    """
    lines: list[str] = []
    stale: list[str] = []
    old: list[str] = []
    words, begin = None, 0
    for number, line in enumerate(text.split("\n"), 1):
        opens, ends = _BEGIN.fullmatch(line), _END.fullmatch(line)
        if words is None:
            lines.append(line)
            if ends:
                raise RequestError(f"{page}:{number}: an end without a table before it")
            if opens:
                words, begin, old = opens[1], number, []
        elif opens:
            break
        elif ends:
            try:
                new = ["", *_made(words, records).split("\n"), ""]
            except RequestError as error:
                raise RequestError(f"{page}:{begin}: table {words}: {error}") from error
            if old != new:
                stale.append(f"{page}:{begin}: table {words}: {_difference(old, new)}")
            lines += [*new, line]
            words = None
        else:
            old.append(line)
    if words is not None:
        raise RequestError(f"{page}:{begin}: table {words} has no <!-- end --> after it")
    return "\n".join(lines), stale


def _difference(old: Sequence[str], new: Sequence[str]) -> str:
    """A text that shows the first difference between two tables."""
    was, now = next(pair for pair in zip_longest(old, new) if pair[0] != pair[1])
    there, expected = ("nothing" if line is None else repr(line) for line in (was, now))
    return f"out of date: the page has {there}, but the records give {expected}"


def _run(root: Path, check: bool) -> list[str]:
    """Rebuild or check a checkout. Return a line for everything that was out of date."""
    if not (root / "README.md").is_file():
        raise RequestError(f"{root} has no README.md; tables are rebuilt in a checkout of pyro-sbp")
    records = read_records(root / "experiments" / "results")
    stale: list[str] = []
    pages: dict[Path, str] = {}
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        pages[path], found = rebuilt(str(path.relative_to(root)), path.read_text("utf-8"), records)
        if not found:
            del pages[path]
        stale += found
    figures = frontier.out_of_date(root, records)
    of_minilm = minilm_tables.out_of_date(root)
    of_prior = prior_figure.out_of_date(root)
    stale += [
        f"{name}: out of date: it is missing, or was drawn from other numbers"
        for name in (*figures, *of_minilm, *of_prior)
    ]
    if check:
        return stale
    if figures:
        frontier.draw(root, records, figures)
    minilm_tables.draw(root, of_minilm)
    prior_figure.draw(root, of_prior)
    for path, text in pages.items():
        try:
            write_text(path, text)
        except OSError as error:
            raise RequestError(str(error)) from error
    return stale


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """The command. Its exit status is 1 if a table cannot be made, or if a checked table is out of
    date.

    Args:
        root: the directory of the checkout.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pyro_sbp.experiments.tables",
        description="Rebuild the tables between markers of README.md and docs/, and the figures.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing, and name the tables that are out of date",
    )
    check = parser.parse_args(arguments).check
    try:
        stale = _run(root, check)
    except RequestError as error:
        print(error, file=sys.stderr)
        return 1
    for line in stale:
        print(line if check else line.replace(": out of date: ", ": rebuilt: ", 1))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
