"""Recorded results, their medians over seeds, and their format in tables."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.recipes.named import RECIPES
from pyro_sbp.training.old_recipes import recipe as present_recipe

__all__ = [
    "METHODS",
    "TITLES",
    "Record",
    "Row",
    "markdown",
    "median_units",
    "of_network",
    "read_records",
    "rows",
    "title",
    "unreadable",
]

#: The names of the networks in tables.
TITLES = {
    "lenet-500-300": "LeNet-500-300",
    "lenet5": "LeNet-5",
    "lenet-300-100": "LeNet-300-100",
    "vgg-like": "VGG-like",
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "pyro_sbp.experiments.narrow:vgg_like": "VGG-like, a quarter as wide",
    "pyro_sbp.experiments.dropout:lenet_300_100": "LeNet-300-100 with dropout",
    "pyro_sbp.experiments.dropout:lenet5_32": "LeNet-5 for 32x32 images",
    "pyro_sbp.experiments.dropout:lenet5_32_dropout": "LeNet-5 for 32x32 images, with dropout",
}
#: The seed in a command, or in the name of a record in a command.
_SEED = r"(?<=--seed )\d+|(?<=-)\d+(?=\.json\b)"
_DATASETS = {
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "folder:cifar10-png": "CIFAR-10",
    "folder:cifar10-jpeg": "CIFAR-10 (JPEG)",
}
#: The names of the methods in tables.
METHODS = {"sbp": "SBP", "rbp": "RBP", "sparse-vd": "SparseVD"}


@dataclass(frozen=True)
class Record:
    """The record of a run or of a baseline in `experiments/results/`.

    Attributes:
        arch, dataset, method: as in a request. The method of a baseline is that of its library.
        recipe: the name of the recipe. For a baseline it is the recipe whose epochs it has.
        baseline: whether the result is that of another library.
        random_labels: whether the network was trained on random labels.
        error: the test error of the final network in percent, after the last epoch.
        dense: the test error of the dense network; None if no dense network was trained.
        units: the numbers of kept units, by gate in the order of the network.
        macs_ratio: the MACs of the dense network divided by those of the final network.
        minutes: the duration of training.
        command: the command that repeats the run, with `N` for the seed.
        settings: the settings of the recipe at the time of the run.
        content: the content of the file.
    """

    arch: str
    dataset: str
    method: str
    recipe: str
    baseline: bool
    random_labels: bool
    seed: int
    error: float
    dense: float | None
    units: dict[str, int]
    macs_ratio: float
    minutes: float
    command: str
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: str
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record of either kind.

        Raises:
            RequestError: the file is not a record.
        """
        try:
            return cls.of(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise unreadable(path, "record", error) from error

    @classmethod
    def of(cls, found: dict[str, Any]) -> Record:
        """The record with the content of a file."""
        baseline = found.get("kind") == "baseline"
        error = found["error"]
        last = error["finetuned"]
        if last is None and not baseline:
            last = error["pruned"]
        return cls(
            arch=found["arch"],
            dataset=found["dataset"],
            method=found["method"],
            recipe=found["of" if baseline else "recipe"],
            baseline=baseline,
            random_labels="training_error" in found,
            seed=int(found["seed"]),
            error=float(last),
            dense=error["dense"],
            units={unit["gate"]: unit["kept"] for unit in found["units"]},
            macs_ratio=float(found["macs"]["ratio"]),
            minutes=found["train_seconds"] / 60,
            command=re.sub(_SEED, "N", found["command"]),
            settings=found["settings"],
            versions=found["versions"],
            machine=found["machine"],
            content=found,
        )

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that repeat the run, with `N` for the seed: first that of the run whose
        weights it started from, if there is one.
        """
        before = self.content.get("started_from")
        return (self.command,) if before is None else (re.sub(_SEED, "N", before), self.command)


def unreadable(path: Path, what: str, error: Exception) -> RequestError:
    """The error to raise for an unreadable file, from the exception of reading it."""
    words = f"lacks {error}" if isinstance(error, KeyError) else first_line(error)
    return RequestError(f"{path} is not a {what}: {words}")


def read_records(directory: Path) -> list[Record]:
    """All records of a directory, in the order of their names.

    Raises:
        RequestError: a JSON file in the directory is not a record, or the settings of its recipe
            have changed since.
    """
    found = {path: Record.read(path) for path in sorted(directory.glob("*.json"))}
    for path, record in found.items():
        now = RECIPES.get(record.recipe)
        method = record.method if now is None else now.method
        made = present_recipe(record.settings, method)
        if now is not None and "started_from" in record.content:
            made["dense_epochs"] = now.dense_epochs
        if now is None or type(now).from_dict(made, str(path)) != now:
            raise RequestError(
                f"{path} was made with other settings of the recipe {record.recipe!r} than it "
                "has now; rename one of the two, or make the record again"
            )
    return list(found.values())


@dataclass(frozen=True)
class Row:
    """The records of a network, a method and a recipe, which differ only in the seed."""

    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        """The first record, for values that do not depend on the seed."""
        return self.records[0]

    @property
    def seeds_in_words(self) -> str:
        """ "seed 0", or "seeds 0 to 4"."""
        return f"seed{'s' * (len(self.records) > 1)} {self.seeds}"

    @property
    def name(self) -> str:
        """The method and the recipe, in Markdown."""
        record = self.first
        if record.baseline:
            return f"{record.method}, epochs of `{record.recipe}`"
        name = f"{METHODS.get(record.method, record.method)}, `{record.recipe}`"
        return name + _taught(record) + _pruned_again(record)

    @property
    def seeds(self) -> str:
        """The seeds, in short."""
        seeds = sorted(record.seed for record in self.records)
        if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
            return f"{seeds[0]} to {seeds[-1]}"
        return ", ".join(map(str, seeds))

    def median(self, of: Callable[[Record], float]) -> float:
        """The median of a number over the seeds."""
        return statistics.median(of(record) for record in self.records)

    @property
    def error(self) -> float:
        """Median test error of the final networks, in percent."""
        return self.median(lambda record: record.error)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest test error, in percent."""
        errors = [record.error for record in self.records]
        return min(errors), max(errors)

    @property
    def dense(self) -> float | None:
        """Median test error of the dense networks, in percent."""
        errors = [record.dense for record in self.records if record.dense is not None]
        return statistics.median(errors) if errors else None

    @property
    def macs_ratio(self) -> float:
        """Median MACs ratio."""
        return self.median(lambda record: record.macs_ratio)

    @property
    def units(self) -> str:
        """Median numbers of kept units, by gate."""
        return median_units([record.units for record in self.records])

    @property
    def error_in_words(self) -> str:
        """Median error and, for several seeds, the range, as text."""
        low, high = self.spread
        return f"{self.error:.2f}" + f" ({low:.2f} to {high:.2f})" * (len(self.records) > 1)

    @property
    def notes(self) -> str:
        """The error of the dense networks, and for MNIST whether images were shifted in training.

        On CIFAR-10, the published results have shifted images too.
        """
        words = [] if self.dense is None else [f"dense {self.dense:.2f}"]
        crop = self.first.settings.get("crop", 0)
        if crop and self.first.dataset == "mnist":
            words.append(f"images shifted by at most {crop} pixel{'' if crop == 1 else 's'}")
        return ", ".join(words)

    @property
    def minutes(self) -> str:
        """Median minutes of training."""
        return f"{self.median(lambda record: record.minutes):.1f}"


def rows(records: Sequence[Record]) -> list[Row]:
    """Group records into rows, in the order of the first record of each row.

    Baselines are grouped by their command, because it contains the MACs ratio.

    Raises:
        RequestError: a row has two records with the same seed.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        key = [record.arch, record.dataset, record.method, record.recipe]
        if record.baseline:
            key.append(record.command)
        else:
            key += [_taught(record), _pruned_again(record)]
        group = groups.setdefault(tuple(key), [])
        if record.seed in {other.seed for other in group}:
            words = f"{record.arch} on {record.dataset} by {record.method}, {record.recipe}"
            raise RequestError(f"seed {record.seed} of {words} is recorded twice")
        group.append(record)
    return [Row(tuple(group)) for group in groups.values()]


def _taught(record: Record) -> str:
    """The text about the teachers of the fine-tuning of a row; empty without `--teacher`."""
    teachers = record.content.get("teachers", ())
    if not teachers:
        return ""
    nets = " and ".join(sorted({title(arch) for arch in teachers}))
    return (
        f", taught by a dense {nets}"
        if len(teachers) == 1
        else (f", taught by {len(teachers)} dense networks ({nets})")
    )


def _pruned_again(record: Record) -> str:
    """The text about a run that was pruned again; empty for other runs."""
    again = record.content.get("pruned_again")
    if again is None:
        return ""
    epochs = again["finetune_epochs"]
    tuned = f" and fine-tuned for {epochs} epoch{'s' * (epochs > 1)}" if epochs else ""
    return f", pruned to {again['macs_ratio']:g}x{tuned}"


def median_units(counts: Sequence[Mapping[str, int]]) -> str:
    """The medians of the numbers of units by gate, in the order of the first record."""
    return "-".join(f"{statistics.median(c[gate] for c in counts):.0f}" for gate in counts[0])


def of_network(records: Sequence[Record], arch: str, dataset: str) -> list[Row]:
    """The rows of a network on a data set, without those with random labels.

    Raises:
        RequestError: there is no such row.
    """
    found = [r for r in records if (r.arch, r.dataset) == (arch, dataset) and not r.random_labels]
    if not found:
        raise RequestError(f"no record of {arch} on {dataset} is in experiments/results")
    return rows(found)


def title(arch: str, dataset: str = "") -> str:
    """The title of a network, and of a data set if one is named."""
    words = TITLES.get(arch, arch)
    return f"{words} on {_DATASETS.get(dataset, dataset)}" if dataset else words


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, *cells]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|" + "---|" * len(head))
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in text)
