"""Tables about single methods, comparisons of methods, and tables of the recipes."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_sbp.datasets.sources import SOURCES
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.network_tables import dataset_of, named
from pyro_sbp.experiments.rows import (
    METHODS,
    TITLES,
    Record,
    Row,
    markdown,
    median_units,
    of_network,
    rows,
    title,
)
from pyro_sbp.recipes.method_recipes import RECIPE_CLASSES, RBPRecipe
from pyro_sbp.recipes.named import RECIPES, default_recipe

__all__ = [
    "compare",
    "random_labels",
    "recipes",
    "recursion",
    "sparse_vd",
    "sparse_vd_seeds",
    "sparse_vd_thresholds",
    "sparse_vd_units",
]

#: Compression of the weights, and test error in percent, from the paper of SparseVD: Molchanov et
#: al. 2017, arXiv 1701.05369.
_PAPER = {"lenet-300-100": (68, 1.92), "lenet5": (280, 0.75)}


def _default_row(records: Sequence[Record], arch: str, method: str) -> Row:
    """The row of the default recipe for a network on its usual data set.

    Raises:
        RequestError: this recipe has no record.
    """
    dataset = dataset_of(arch)
    name = default_recipe(arch, dataset, method).name
    for row in of_network(records, arch, dataset):
        if (row.first.method, row.first.recipe, row.first.baseline) == (method, name, False):
            return row
    raise RequestError(f"no record of {arch} on {dataset} is of {method} with the recipe {name!r}")


def _papers(arch: str) -> str:
    return "1 in {}, {:.2f} %".format(*_PAPER[arch])


def sparse_vd(records: Sequence[Record]) -> str:
    """The table of the weights and units that SparseVD keeps in the networks of its paper."""
    cells = []
    for arch in _PAPER:
        row = _default_row(records, arch, "sparse-vd")
        several = "median of " * (len(row.records) > 1)
        left = row.median(lambda record: record.content["weights"]["compression"])
        dense = row.median(lambda record: record.content["files"]["dense"])
        sparse = row.median(lambda record: record.content["files"]["sparse"])
        cells.append(
            (
                f"{title(arch)}, {several}{row.seeds_in_words}",
                f"1 in {left:.3g}",
                f"{row.error:.2f} %",
                _papers(arch),
                f"{dense:,.0f}, {sparse:,.0f}",
                row.units,
                f"{row.macs_ratio:.1f}x",
            )
        )
    head = (
        "MNIST, last epoch",
        "weights left",
        "test error",
        "the paper's",
        "bytes: dense, sparse file",
        "units left",
        "MACs",
    )
    return markdown(head, cells)


def sparse_vd_seeds(records: Sequence[Record]) -> str:
    """The table of the results of SparseVD, with one row per seed."""
    cells = []
    for arch in _PAPER:
        for index, record in enumerate(_default_row(records, arch, "sparse-vd").records):
            cells.append(
                (
                    f"{title(arch)}, {record.seed}",
                    f"1 in {_weights_left(record):.1f}",
                    f"{record.error:.2f} %",
                    "" if index else _papers(arch),
                )
            )
    return markdown(("network, seed", "weights left", "test error", "the paper's"), cells)


def sparse_vd_thresholds(records: Sequence[Record]) -> str:
    """The table of compression and error of the first seed at other thresholds.

    Raises:
        RequestError: a record was made without other thresholds.
    """
    by_arch = []
    for arch in _PAPER:
        first = _default_row(records, arch, "sparse-vd").first
        if "thresholds" not in first.content:
            raise RequestError(f"the record of {arch}, seed {first.seed}, has no thresholds")
        by_arch.append({f"{line['threshold']:.3g}": line for line in first.content["thresholds"]})
    cells = []
    for threshold in by_arch[0]:
        if all(threshold in lines for lines in by_arch):
            cells.append([threshold + ", the paper's" * (threshold == "0.223")])
            for lines in by_arch:
                left = lines[threshold]["compression"]
                words = "none" if left is None else f"1 in {left:.0f}"
                cells[-1].append("all" if left == 1 else words)
                cells[-1].append(f"{lines[threshold]['error']:.2f} %")
    head = ["SNR at least"]
    for arch in _PAPER:
        head += [f"{title(arch)}: weights left", "test error"]
    return markdown(head, cells)


def _weights_left(record: Record) -> float:
    """The number of all weights divided by that of the kept weights, without biases."""
    if "weights" in record.content:
        return record.content["weights"]["compression"]
    # Every class, and every unit that is not an input feature, has a bias.
    parameters, classes = record.content["parameters"], 10
    before, after = (
        sum(unit[key] for unit in record.content["units"] if not unit["gate"].endswith("_input"))
        for key in ("total", "kept")
    )
    return (parameters["dense"] - before - classes) / (parameters["pruned"] - after - classes)


def sparse_vd_units(records: Sequence[Record], *beside: str) -> str:
    """The table that compares the units of networks by SparseVD with those by a recipe of SBP.

    Rows are those of the first seed.

    Args:
        records: all records.
        beside: the recipe of SBP for each network of SparseVD.

    Raises:
        RequestError: the numbers of recipes and networks differ, or a recipe has no record.
    """
    if len(beside) != len(_PAPER):
        raise RequestError(f"sparse-vd-units names {len(beside)} recipes, for {', '.join(_PAPER)}")
    cells = []
    for arch, recipe in zip(_PAPER, beside, strict=True):
        (sbp,) = named(records, arch, [recipe], "sparse-vd-units")
        for record in (_default_row(records, arch, "sparse-vd").first, sbp.first):
            cells.append(
                (
                    f"{title(arch)}, {METHODS[record.method]}, seed {record.seed}",
                    "-".join(map(str, record.units.values())),
                    f"{record.macs_ratio:.1f}x",
                    f"1 in {_weights_left(record):.1f}",
                    f"{record.error:.2f} %",
                )
            )
    return markdown(("network, method", "units left", "MACs", "weights left", "test error"), cells)


def recursion(records: Sequence[Record], arch: str, *recipes: str) -> str:
    """The results of RBP turn by turn: a table for each recipe, or for the named recipes.

    Raises:
        RequestError: there is no record of RBP with its phases.
    """
    dataset = dataset_of(arch)
    found = [
        row
        for row in of_network(records, arch, dataset)
        if row.first.method == "rbp" and all("phases" in r.content for r in row.records)
        if not recipes or row.first.recipe in recipes
    ]
    if not found:
        told = f" with the recipe {' or '.join(recipes)}" if recipes else ""
        raise RequestError(f"no record of {arch} on {dataset} by rbp{told} has its phases")
    return "\n\n".join(_turns(row) for row in found)


def _turns(row: Row) -> str:
    """The table of a recipe: medians over the seeds at the end of every phase."""
    first = row.first
    cells = []
    for seeds in zip(*(record.content["phases"] for record in row.records), strict=True):
        cells.append(
            (
                seeds[0]["phase"],
                str(seeds[0]["epochs"]),
                f"{statistics.median(phase['error'] for phase in seeds):.2f}",
                median_units([phase["units"] for phase in seeds]),
                f"{statistics.median(phase['seconds_per_epoch'] for phase in seeds):.1f}",
            )
        )
    head = ("after", "epochs", "error, %", "units", "seconds an epoch")
    return (
        f"{first.arch}, {first.dataset}, {first.method}, recipe {first.recipe}, "
        f"{row.seeds_in_words}: {row.macs_ratio:.1f} times fewer MACs, {row.minutes} minutes\n\n"
        + markdown(head, cells)
    )


def compare(records: Sequence[Record], arch: str, *recipes: str) -> str:
    """The table that compares recipes, with the order of RBP and the epochs of all phases.

    Raises:
        RequestError: no recipe is named, or one has no record or does not exist any more.
    """
    cells = []
    for row in named(records, arch, recipes, "compare"):
        recipe = RECIPES.get(row.first.recipe)
        if recipe is None:
            raise RequestError(f"no recipe is called {row.first.recipe!r}, but a record is")
        cells.append(
            (
                row.name,
                recipe.order if isinstance(recipe, RBPRecipe) else "-",
                row.seeds,
                row.error_in_words,
                row.units,
                f"{row.macs_ratio:.2f}x",
                row.minutes,
                str(recipe.dense_epochs + recipe.epochs + recipe.finetune_epochs),
            )
        )
    head = ("method", "order", "seeds", "test error, %", "units", "MACs", "minutes", "epochs")
    return markdown(head, cells)


def random_labels(records: Sequence[Record]) -> str:
    """The table of runs with random labels, which shows whether a network memorised them.

    For a recipe with dense epochs, the row is that of the dense network with all units. For another
    recipe, the units are those that reach the threshold after the last epoch with noise. The
    returned network keeps at least one unit per layer.

    Raises:
        RequestError: there is no record with random labels.
    """
    found = rows([record for record in records if record.random_labels])
    if not found:
        raise RequestError("no record of random labels is in experiments/results")
    cells = []
    for row in found:
        dense = row.dense is not None
        total = "-".join(str(unit["total"]) for unit in row.first.content["units"])
        left = total if dense else median_units([_last_noise(r)["units"] for r in row.records])
        errors = [record.content["training_error"] for record in row.records]
        names = ("dense",) if dense else ("finetuned", "pruned")
        training = [next(e[name] for name in names if e[name] is not None) for e in errors]
        how = f"dense training, `{row.first.recipe}`" if dense else row.name
        cells.append(
            (
                f"{title(row.first.arch, row.first.dataset)}, {how}",
                row.seeds,
                f"{left} of {total}",
                f"{statistics.median(training):.1f}",
                f"{row.dense if dense else row.error:.1f}",
            )
        )
    head = ("network, method", "seeds", "units left", "training error, %", "test error, %")
    return markdown(head, cells)


def _last_noise(record: Record) -> Mapping[str, Any]:
    """The last phase with noise."""
    phases = record.content["phases"]
    return next(phase for phase in reversed(phases) if phase["phase"] != "finetuned")


def recipes(records: Sequence[Record]) -> str:
    """The table of the recipes with a name, with their settings and where they are the default."""
    columns = ("dense_epochs", "epochs", "finetune_epochs", "batch_size", "kl_scale")
    cells = []
    for recipe in RECIPES.values():
        others = [
            f"{field.name} {_value(getattr(recipe, field.name))}"
            for field in dataclasses.fields(recipe)
            if field.name not in ("name", *columns)
            and getattr(recipe, field.name) != getattr(type(recipe)(), field.name)
        ]
        values = (_value(getattr(recipe, name)) for name in columns)
        default_for = _default_for(recipe.name)
        cells.append((f"`{recipe.name}`", *values, ", ".join(others), default_for))
    head = ("name", *(f"`{name}`" for name in columns), "other settings", "the default for")
    return markdown(head, cells)


def settings(records: Sequence[Record]) -> str:
    """The table of the settings of recipes, with their methods, defaults and descriptions."""
    found: dict[str, dict[str, Any]] = {}
    for method, cls in RECIPE_CLASSES.items():
        for field in dataclasses.fields(cls):
            found.setdefault(field.name, {})[method] = cls
    cells = []
    for name, classes in found.items():
        methods = "all" if len(classes) == len(RECIPE_CLASSES) else ", ".join(classes)
        defaults: dict[str, list[str]] = {}
        for method, cls in classes.items():
            defaults.setdefault(_value(getattr(cls(), name)), []).append(method)
        first, *others = defaults.items()
        default = f"`{first[0]}`" + "".join(
            f", for {' and '.join(of)} `{value}`" for value, of in others
        )
        texts = dict.fromkeys(c.__pydantic_fields__[name].description for c in classes.values())
        cells.append((f"`{name}`", methods, default, next(iter(texts))))
    return markdown(("setting", "methods", "default", "description"), cells)


def _value(value: Any) -> str:
    """The value of a setting as short text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(one)}" for name, one in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).lower()
    return f"{value:g}"


def _default_for(name: str) -> str:
    """The networks and data sets for which a recipe is the default, as text; may be empty."""
    words = []
    for method in METHODS:
        found = []
        for dataset in ("", *SOURCES, "digits"):
            for arch in ("", *TITLES):
                if default_recipe(arch, dataset, method).name != name:
                    continue
                # Omitted if all networks of the data set, or all data sets of the network, have
                # the same default, because these are listed already.
                wider = [("", dataset)] * bool(arch) + [(arch, "")] * bool(dataset)
                if all(default_recipe(*pair, method).name != name for pair in wider):
                    on = f" on {dataset}" if arch and dataset else dataset
                    found.append(f"{title(arch)}{on}" or "all else")
        if found:
            by = "" if method == "sbp" else f", by {METHODS[method]}"
            words.append(", ".join(dict.fromkeys(found)) + by)
    return "; ".join(words)
