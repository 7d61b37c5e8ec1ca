"""The contents of a run directory, as validated values. This module needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from pyro_sbp.errors import RequestError, damage
from pyro_sbp.recipes.request import Request
from pyro_sbp.recipes.validation import in_one_line
from pyro_sbp.training import old_recipes
from pyro_sbp.training.summary import Summary

__all__ = [
    "BenchRow",
    "GateNumbers",
    "Line",
    "Run",
    "SavedNetwork",
    "read_request",
    "read_saved_network",
    "read_threads",
]

# Keys of later versions are not removed.
_CONFIG = ConfigDict(extra="allow", strict=True)
_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@with_config(_CONFIG)
class Line(TypedDict):
    """A line of `metrics.jsonl`, for one epoch.

    `loss` is `nll` + `weighted_kl`, per example. `kl` is the KL divergence without weights, per
    example. `error` is the test error in percent. `units` are the numbers of kept units, by gate.
    """

    phase: str
    epoch: _Count
    loss: float
    nll: float
    kl: float
    error: float
    units: dict[str, _Count]
    seconds: float
    weighted_kl: NotRequired[float]
    held: NotRequired[list[str]]
    macs: NotRequired[float]
    control: NotRequired[dict[str, float]]


@with_config(_CONFIG)
class BenchRow(TypedDict):
    """A row of `bench.json`: the latency of a call in milliseconds, see `Latency`."""

    device: str
    threads: _Count
    batch_size: _Count
    dense_ms: _Positive
    pruned_ms: _Positive
    speedup: _Positive
    spread: float
    floor_ms: NotRequired[_Positive | None]
    runtime: NotRequired[str]
    speedup_low: NotRequired[_Positive | None]
    speedup_high: NotRequired[_Positive | None]


@with_config(_CONFIG)
class GateNumbers(TypedDict):
    """The units of a gate in `units.json`: their number in the dense network, and the indices of
    those that remain."""

    total: _Count
    kept: list[_Count]
    zeroed: list[_Count]


@with_config(_CONFIG)
class SavedNetwork(TypedDict):
    """The values of `network.json` that are needed to build and call the network."""

    kwargs: dict[str, Any]
    input_shape: list[_Count] | None


T = TypeVar("T")


def _validated(path: Path, value: Any, kind: type[T]) -> T:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise RequestError(f"{path} is damaged: {in_one_line(error)}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} is damaged: {damage(error)}") from error


def _read(path: Path, kind: type[T]) -> T | None:
    """The validated content of a JSON file; None if the file does not exist."""
    return _validated(path, _json(path), kind) if path.is_file() else None


def read_saved_network(directory: Path) -> SavedNetwork:
    """Read the `network.json` of a saved network.

    Raises:
        RequestError: the file is missing or damaged.
    """
    found = _read(directory / "network.json", SavedNetwork)
    if found is None:
        raise RequestError(f"{directory} has no saved network: network.json is missing")
    return found


def read_request(directory: Path) -> Request:
    """Read the request of a run.

    Raises:
        RequestError: the directory is not a run directory, or its `recipe.json` is damaged.
    """
    path = directory / "recipe.json"
    if not directory.exists():
        raise RequestError(f"there is no directory {directory}; expected the directory of a run")
    if not path.is_file():
        raise RequestError(f"{directory} is not a run directory: it has no recipe.json")
    asked = _validated(path, _json(path), dict)
    try:
        return Request.from_dict(old_recipes.request(asked))
    except RequestError as error:
        raise RequestError(f"{path} is damaged: {error}") from error


def read_threads(directory: Path) -> int | None:
    """Read the number of CPU threads with which a run was started; None if it is not recorded.

    If a run resumes with another number, its results may differ in rounding.

    Raises:
        RequestError: the `recipe.json` is damaged.
    """
    path = directory / "recipe.json"
    threads = _validated(path, _json(path), dict).get("threads")
    return threads if isinstance(threads, int) and threads > 0 else None


@dataclass(frozen=True)
class Run:
    """A run directory, finished or not.

    Attributes:
        directory: the path of the run directory.
        request: the request of the run.
        asked: the content of `recipe.json`, with versions and the machine.
        metrics: the lines of `metrics.jsonl` in order; empty before the first epoch has ended.
        summary: the content of `summary.json`; None until the run has finished.
        network: the content of `pruned/network.json`; None until the run has finished.
        units: the content of `pruned/units.json`; None until the run has finished.
        bench: the rows of `bench.json`; rows without a runtime are those of "eager". None if
            `bench` was not run.
    """

    directory: Path
    request: Request
    asked: dict[str, Any]
    metrics: list[Line]
    summary: Summary | None
    network: SavedNetwork | None
    units: dict[str, GateNumbers] | None
    bench: list[BenchRow] | None

    @classmethod
    def read(cls, directory: str | Path) -> Run:
        """Read a run directory.

        Raises:
            RequestError: the directory is not a run directory, or a file in it is damaged.
        """
        path = Path(directory)
        request = read_request(path)
        summary = path / "summary.json"
        finished = summary.is_file()
        # The network and the measurements of a run are not final before it has a summary.
        pruned = path / "pruned" if finished else path / "none"
        bench = _read(path / "bench.json", list[BenchRow])
        return cls(
            path,
            request,
            _read(path / "recipe.json", dict[str, Any]) or {},
            _lines(path / "metrics.jsonl"),
            Summary.read(summary) if finished else None,
            _read(pruned / "network.json", SavedNetwork),
            _read(pruned / "units.json", dict[str, GateNumbers]),
            None if bench is None else [{"runtime": "eager", **row} for row in bench],
        )

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.directory.resolve().name

    @property
    def error(self) -> float | None:
        """The test error of the returned network in percent; None until the run has finished."""
        return None if self.summary is None else self.summary.error.last

    @property
    def macs_ratio(self) -> float | None:
        """MACs of the dense network divided by those of the returned network; None until the run
        has finished."""
        return None if self.summary is None else self.summary.macs.ratio


def _lines(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    try:
        values = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} is damaged: {damage(error)}") from error
    return _validated(path, values, list[Line])
