"""Tables that compare the results of a network with those of the papers, and of the commands."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pyro_sbp.architectures import ARCHITECTURES
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.rows import Record, Row, markdown, of_network, rows, title
from pyro_sbp.reports.published import published
from pyro_sbp.training.summary import percent

__all__ = [
    "baselines",
    "calibration",
    "commands",
    "dataset_of",
    "headline",
    "named",
    "network",
    "speed",
]


#: The data sets of networks that are not in `ARCHITECTURES`, or whose records have another data set
#: than the default.
_DATASETS = {
    "pyro_sbp.experiments.narrow:vgg_like": "folder:cifar10-jpeg",
    "resnet20": "folder:cifar10-png",
}
#: Folders with the images of a data set in a lossless format. Published results are those of the
#: data set.
_LOSSLESS = {"folder:cifar10-png": "cifar10"}


def dataset_of(arch: str) -> str:
    """The data set of the tables of a network, unless another one is named.

    Raises:
        RequestError: the network is unknown, or has no default data set.
    """
    if arch in _DATASETS:
        return _DATASETS[arch]
    dataset = ARCHITECTURES[arch].dataset if arch in ARCHITECTURES else None
    if dataset is None:
        raise RequestError(f"unknown network {arch!r}; expected {', '.join(ARCHITECTURES)}")
    return dataset


def network(records: Sequence[Record], arch: str, dataset: str | None = None) -> str:
    """The rows of the papers for a network, and our rows in bold, ordered by the MACs ratio."""
    dataset = dataset or dataset_of(arch)
    lines = []
    for paper in published(arch, _LOSSLESS.get(dataset, dataset)):
        source, _, words = paper.source.partition(": ")
        name = f"{paper.method}, {source.partition(', ')[0]}"
        cells = (name, "-", percent(paper.error), paper.units or "-", f"{paper.macs_ratio:g}x")
        lines.append((paper.macs_ratio, (*cells, words)))
    for row in of_network(records, arch, dataset):
        if not row.first.baseline:
            cells = (row.seeds, row.error_in_words, row.units, f"{row.macs_ratio:.2f}x", row.notes)
            lines.append((row.macs_ratio, (f"**{row.name}**", *cells)))
    head = ("method", "seeds", "test error, %", "units", "MACs", "notes")
    return markdown(head, [cells for _, cells in sorted(lines, key=lambda line: line[0])])


def named(records: Sequence[Record], arch: str, recipes: Sequence[str], table: str) -> list[Row]:
    """The rows of the named recipes, on the default data set of the network.

    Raises:
        RequestError: no recipe is named, or a recipe has no record.
    """
    dataset = dataset_of(arch)
    if not recipes:
        raise RequestError(f"{table} {arch} names no recipe: {table} {arch} RECIPE ...")
    rows_of = [row for row in of_network(records, arch, dataset) if not row.first.baseline]
    ours = {row.first.recipe: row for row in rows_of}
    if len(ours) < len(rows_of):
        raise RequestError(f"records of {arch} on {dataset} by two methods have one recipe")
    for recipe in recipes:
        if recipe not in ours:
            raise RequestError(f"no record of {arch} on {dataset} has the recipe {recipe!r}")
    return [ours[recipe] for recipe in recipes]


def headline(records: Sequence[Record], arch: str, *recipes: str) -> str:
    """The row of the paper's SBP and the rows of the named recipes, on the default data set of the
    network.

    Raises:
        RequestError: no recipe is named, or a recipe has no record.
    """
    dataset = dataset_of(arch)
    chosen = named(records, arch, recipes, "headline")
    papers = {paper.method: paper for paper in published(arch, dataset)}
    cells = []
    if "SBP" in papers:
        paper, dense = papers["SBP"], percent(papers["dense"].error)
        ratio = f"{paper.macs_ratio:g}x"
        cells.append(("SBP, the paper's", dense, percent(paper.error), paper.units, ratio))
    for row in chosen:
        name, dense = f"{row.name}, {row.seeds_in_words}", percent(row.dense)
        ratio = f"{row.macs_ratio:.2f}x"
        cells.append((name, dense, row.error_in_words, row.units, ratio))
    head = (title(arch, dataset), "dense error, %", "test error, %", "units", "MACs")
    return markdown(head, cells)


def baselines(records: Sequence[Record], arch: str, *recipes: str) -> str:
    """The rows of the named recipes, each followed by the results of other libraries with the same
    MACs and epochs.

    Raises:
        RequestError: no recipe is named, or a recipe has no record of a run or of another library.
    """
    dataset = dataset_of(arch)
    theirs = [row for row in of_network(records, arch, dataset) if row.first.baseline]
    cells = []
    for ours in named(records, arch, recipes, "baselines"):
        recipe = ours.first.recipe
        found = [row for row in theirs if f"-{recipe}-N.json" in row.first.command]
        if not found:
            raise RequestError(f"no baseline of {arch} on {dataset} is of {recipe!r}")
        for row in (ours, *sorted(found, key=lambda row: row.error)):
            steps = row.first.content.get("steps")
            name = f"{row.first.method}, {steps} steps" if steps else f"**{row.name}**"
            ratio = f"{row.macs_ratio:.2f}x"
            dense = percent(row.dense)
            cells.append((name, row.seeds, dense, row.error_in_words, row.units, ratio))
    head = ("method", "seeds", "dense error, %", "test error, %", "units", "MACs")
    return markdown(head, cells)


def calibration(records: Sequence[Record], arch: str, dataset: str | None = None) -> str:
    """The error, the negative log-likelihood and the expected calibration error, before and after
    pruning.

    Raises:
        RequestError: no record has these values.
    """
    dataset = dataset or dataset_of(arch)
    cells = []
    for row in of_network(records, arch, dataset):
        if not all(record.content.get("calibration") for record in row.records):
            continue
        last = "finetuned" if row.first.content["error"]["finetuned"] is not None else "pruned"
        measured = []
        for name, digits in (("nll", 3), ("ece", 2)):
            for of in ("dense", last):
                values = [r.content["calibration"]["test"][of][name] for r in row.records]
                measured.append(f"{statistics.median(values):.{digits}f}")
        cells.append((row.name, row.seeds, f"{row.macs_ratio:.2f}x", *measured))
    if not cells:
        raise RequestError(f"no record of {arch} on {dataset} has its calibration")
    head = (
        "method",
        "seeds",
        "MACs",
        "NLL, dense",
        "NLL, pruned",
        "ECE, dense, %",
        "ECE, pruned, %",
    )
    return markdown(head, cells)


def speed(records: Sequence[Record], arch: str, dataset: str | None = None) -> str:
    """Measured speed-ups and MACs ratios, by batch size and runtime, for one thread.

    Raises:
        RequestError: no record has latencies.
    """
    dataset = dataset or dataset_of(arch)
    cells = []
    for row in of_network(records, arch, dataset):
        for record in row.records:
            by_batch: dict[int, dict[str, Any]] = {}
            for latency in record.content.get("latencies", ()):
                if latency["threads"] == 1 and latency["device"].startswith("cpu"):
                    by_batch.setdefault(latency["batch_size"], {})[latency["runtime"]] = latency
            for batch, found in by_batch.items():
                measured = [
                    f"{found[r]['dense_ms']:.2f} to {found[r]['pruned_ms']:.2f} ms, "
                    f"{found[r]['speedup']:.2f}x"
                    if r in found
                    else "-"
                    for r in ("eager", "compile", "onnxruntime")
                ]
                name = f"{row.name}, seed {record.seed}"
                cells.append((name, f"{record.macs_ratio:.2f}x", str(batch), *measured))
    if not cells:
        raise RequestError(f"no record of {arch} on {dataset} has latencies")
    head = ("method", "MACs", "batch size", "eager", "compiled", "ONNX Runtime")
    return markdown(head, cells)


def commands(records: Sequence[Record]) -> str:
    """The command of each row, with seeds, minutes, machine and versions. N is the seed.

    If a run started from the weights of another run, the command of that run comes first. Its
    minutes are not counted.

    Raises:
        RequestError: there are no records.
    """
    if not records:
        raise RequestError("experiments/results has no record")
    machines: dict[str, int] = {}
    versions: dict[str, str] = {}
    cells = []
    for row in rows(records):
        where = {machines.setdefault(r.machine, len(machines) + 1) for r in row.records}
        used = {
            versions.setdefault(_versions(r), chr(ord("A") + len(versions))) for r in row.records
        }
        by_command = {
            words: Row(tuple(r for r in row.records if r.commands == words)).seeds_in_words
            for words in dict.fromkeys(r.commands for r in row.records)
        }
        made = "<br>".join(
            ", then ".join(f"`{word}`" for word in words) + f" ({seeds})" * (len(by_command) > 1)
            for words, seeds in by_command.items()
        )
        on = ", ".join(map(str, sorted(where))) + "; " + ", ".join(sorted(used))
        what = f"{title(row.first.arch)}, {row.name}"
        cells.append((what, made, row.seeds, row.minutes, on))
    head = ("row", "command", "seeds", "minutes", "machine; versions")
    lists = [
        *(f"- Machine {number}: {name}." for name, number in machines.items()),
        *(f"- Versions {letter}: {words}." for words, letter in versions.items()),
    ]
    return markdown(head, cells) + "\n\n" + "\n".join(lists)


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.versions.items())
