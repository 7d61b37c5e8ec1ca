"""The result of a run, as in `summary.json`. This module needs no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pyro_sbp.errors import RequestError, damage
from pyro_sbp.reasons import lines_not_prunable
from pyro_sbp.recipes.validation import in_one_line

__all__ = [
    "Calibration",
    "Differences",
    "Errors",
    "GateUnits",
    "Size",
    "Summary",
    "Target",
    "WeightsLeft",
]

# Keys of later versions are ignored. JSON has lists for tuples.
_CONFIG = pydantic.ConfigDict(extra="ignore", allow_inf_nan=False)

_Count = Annotated[int, Field(ge=0, strict=True)]
_Number = Annotated[float, Field(ge=0, strict=True)]
_Percent = Annotated[float, Field(ge=0, le=100, strict=True)]

#: The labels of the networks of a run in tables.
LABELS = {
    "dense": "dense",
    "mean": "noise at its mean",
    "pruned": "pruned",
    "finetuned": "fine-tuned",
}


@dataclass(frozen=True, config=_CONFIG)
class Errors:
    """Errors of the networks of a run in percent, after the last epoch.

    Attributes:
        dense: the dense network, without noise; None if no dense network was trained.
        mean: the network with all units, with the noise at its mean.
        pruned: the network without the units under the threshold.
        finetuned: the pruned network after fine-tuning; None without fine-tuning.
    """

    dense: _Percent | None = None
    mean: _Percent | None = None
    pruned: _Percent | None = None
    finetuned: _Percent | None = None

    @property
    def last(self) -> float | None:
        """The error of the returned network."""
        return self.pruned if self.finetuned is None else self.finetuned


@dataclass(frozen=True, config=_CONFIG)
class Calibration:
    """The calibration of a network.

    Attributes:
        nll: the negative log-likelihood in nats per example.
        ece: the expected calibration error in percent.
    """

    nll: _Number
    ece: _Percent


@dataclass(frozen=True, config=_CONFIG)
class GateUnits:
    """The units of a gate: kept, zeroed (columns of zeros that a shape requires), and total."""

    gate: str
    kept: _Count
    total: _Count
    zeroed: _Count = 0


@dataclass(frozen=True, config=_CONFIG)
class Size:
    """A size of the dense and of the pruned network, and their ratio.

    Attributes:
        nonzero: the number of parameters of the pruned network that are not zero.
    """

    dense: _Count
    pruned: _Count
    ratio: _Number
    nonzero: _Count | None = None


@dataclass(frozen=True, config=_CONFIG)
class LayerWeights:
    """The number of weights of a layer that are kept, and of all its weights."""

    layer: str
    kept: _Count
    total: _Count


@dataclass(frozen=True, config=_CONFIG)
class WeightsLeft:
    """The weights that are kept, for a method that removes weights.

    Attributes:
        layers: the numbers for each layer.
        kept, total: the numbers for the whole network.
        compression: all weights divided by those that are kept; None if no weight is kept.
    """

    layers: tuple[LayerWeights, ...]
    kept: _Count
    total: _Count
    compression: _Number | None

    @property
    def in_words(self) -> str:
        """The number of kept weights, as text."""
        if self.compression is None:
            return "no weight is left"
        return f"{self.compression:.1f} times fewer weights"

    def rows(self) -> list[tuple[str, str, str]]:
        """The rows of a table: layer, weights kept, all weights."""
        layers = [(x.layer, f"{x.kept:,}", f"{x.total:,}") for x in self.layers]
        return [*layers, ("all", f"{self.kept:,}", f"{self.total:,}")]


@dataclass(frozen=True, config=_CONFIG)
class FileSizes:
    """Bytes of the saved networks; `sparse` is the file that stores no zeros."""

    dense: _Count
    pruned: _Count
    sparse: _Count | None = None


@dataclass(frozen=True, config=_CONFIG)
class Differences:
    """The differences between the pruned and the masked network; see `Equivalence`."""

    max_rel_diff_float64: _Number
    max_abs_diff: _Number


@dataclass(frozen=True, config=_CONFIG)
class Target:
    """How a network with a target of MACs was chosen; see `TargetReached`."""

    macs_ratio: _Number
    threshold: float
    ratio_by_threshold: _Number


#: Fields that are omitted if they are None, instead of being written as null.
_OPTIONAL = (
    "target",
    "validation_error",
    "training_error",
    "calibration",
    "weights",
    "files",
    "threads",
    "standardize",
)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Summary:
    """The result of a run.

    Attributes:
        arch, dataset, method, seed, device: those of the request.
        epochs: the number of epochs with noise.
        threads: the number of CPU threads of torch.
        train_seconds: the time of all epochs.
        error: the errors on the test set.
        validation_error: the errors on the images reserved for validation, if there are any.
        training_error: the errors on the training images, if their labels are random.
        calibration: the calibration of the same networks on the same images, by the name of the
            images ("test", "validation", "training") and of the network (as in `Errors`); None in
            summaries of earlier versions.
        units: the units of the gates, by gate.
        weights: the number of weights that are kept, for a method that removes weights.
        files: bytes of the saved networks.
        held: the gates in which no unit reached the threshold, so that only the best was kept.
        left_alone: the layers that are not prunable, and why.
        shares: their shares of the parameters and of the MACs before training; empty in summaries
            of earlier versions.
        macs: multiply-accumulates of one example.
        parameters: the number of parameters.
        equivalence: the differences between the pruned and the masked network.
        target: how the units were chosen, if the recipe has a target of MACs.
        teachers: the architectures of the dense networks that were the teachers of the fine-tuning;
            empty without `--teacher`.
        standardize: mean and standard deviation by channel, if images are standardized.
    """

    arch: str
    dataset: str
    method: str
    seed: int
    epochs: int
    device: str
    train_seconds: _Number
    error: Errors
    units: tuple[GateUnits, ...]
    macs: Size
    parameters: Size
    equivalence: Differences
    threads: int | None = None
    validation_error: Errors | None = None
    training_error: Errors | None = None
    calibration: Mapping[str, Mapping[str, Calibration]] | None = None
    weights: WeightsLeft | None = None
    files: FileSizes | None = None
    held: tuple[str, ...] = ()
    left_alone: Mapping[str, str] = Field(default_factory=dict)
    shares: Mapping[str, tuple[float, float]] = Field(default_factory=dict)
    standardize: Mapping[str, Sequence[float]] | None = None
    target: Target | None = None
    teachers: tuple[str, ...] = ()

    def not_prunable(self, most: int | None = None) -> list[str]:
        """A line for each layer that is not prunable, those with most parameters first.

        Args:
            most: the largest number of layers that are named; by default all.
        """
        return lines_not_prunable(self.left_alone, self.shares, most, "summary.json")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        for name in _OPTIONAL:
            if values[name] is None:
                del values[name]
        if not values["teachers"]:
            del values["teachers"]
        if values["macs"]["nonzero"] is None:
            del values["macs"]["nonzero"]
        if "files" in values and values["files"]["sparse"] is None:
            del values["files"]["sparse"]
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: Any) -> Summary:
        """The summary from the values that `to_dict` returned.

        Raises:
            RequestError: a value is missing or has a wrong type.
        """
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise RequestError(in_one_line(error)) from error

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read a `summary.json`.

        Raises:
            RequestError: the file cannot be read, or is damaged.
        """
        try:
            return cls.from_dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise RequestError(f"{path} is damaged: {damage(error)}") from error

    @property
    def nothing_left(self) -> bool:
        """Whether no unit of any gate, or no weight with noise, reached the threshold."""
        if self.weights is not None and not any(layer.kept for layer in self.weights.layers):
            return True
        return 0 < len(self.units) == len(self.held)

    def errors(self) -> dict[str, Errors]:
        """The measured errors, by the name of the images."""
        found = {
            "test": self.error,
            "validation": self.validation_error,
            "training": self.training_error,
        }
        return {name: errors for name, errors in found.items() if errors is not None}

    def error_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Head and rows of a table of the networks: for each of `errors` the error in percent and,
        if measured, NLL in nats per example and ECE in percent."""
        head, rows = ["network"], {name: [label] for name, label in LABELS.items()}
        for split, errors in self.errors().items():
            head.append(f"{split} error, %")
            for name, row in rows.items():
                row.append(percent(getattr(errors, name)))
            found = (self.calibration or {}).get(split)
            if not found:
                continue
            head += ["NLL", "ECE, %"]
            for name, row in rows.items():
                one = found.get(name)
                row += ["-", "-"] if one is None else [f"{one.nll:.4f}", percent(one.ece)]
        return tuple(head), [tuple(row) for row in rows.values()]

    def unit_rows(self) -> list[tuple[Any, ...]]:
        """The rows of a table of units: gate, kept, total, zeroed."""
        return [(unit.gate, unit.kept, unit.total, unit.zeroed) for unit in self.units]

    def size_rows(self) -> list[tuple[str, str, str, str]]:
        """The rows of a table of sizes: name, dense, pruned, ratio."""
        return [
            (label, f"{size.dense:,}", f"{size.pruned:,}", f"{size.ratio:.2f}x")
            for label, size in (("MACs", self.macs), ("parameters", self.parameters))
        ]


def percent(value: float | None) -> str:
    """A number in percent, formatted for tables."""
    return "-" if value is None else f"{value:.2f}"
