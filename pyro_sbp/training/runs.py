"""What lies in a run directory, as values. This module needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.request import Request
from pyro_sbp.training import old_recipes

__all__ = ["Run", "read_request"]


def read_request(directory: Path) -> Request:
    """What a run was asked for.

    Raises:
        RequestError: the directory holds no run, or one that is damaged.
    """
    if not (directory / "recipe.json").is_file():
        raise RequestError(f"{directory} holds no run: it has no recipe.json")
    try:
        asked = json.loads((directory / "recipe.json").read_text("utf-8"))
        return Request.from_dict(old_recipes.request(asked))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{directory}/recipe.json is damaged: {error}") from error


@dataclass(frozen=True)
class Run:
    """A run directory, finished or not.

    Attributes:
        directory: where it lies.
        request: what was asked for.
        asked: the whole of `recipe.json`, with versions and the machine.
        metrics: the lines of `metrics.jsonl`, in order; empty before the first epoch has ended.
        summary: of `summary.json`; None until the run has finished.
        network: of `pruned/network.json`; None until then.
        units: of `pruned/units.json`; None until then.
        bench: the rows of `bench.json`, those without a runtime as of "eager"; None
            where `bench` has not measured.
    """

    directory: Path
    request: Request
    asked: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    network: dict[str, Any] | None
    units: dict[str, Any] | None
    bench: list[dict[str, Any]] | None

    @classmethod
    def read(cls, directory: str | Path) -> Run:
        """Read a run directory.

        Raises:
            RequestError: it holds no run, or a file of it is damaged.
        """
        path = Path(directory)
        request = read_request(path)
        summary = _json(path / "summary.json", dict)
        # Those of a run that was stopped before its summary are not its last word.
        bench = _json(path / "bench.json", list)
        pruned = path / "pruned" if summary is not None else path / "none"
        return cls(
            path,
            request,
            _json(path / "recipe.json", dict),
            _lines(path / "metrics.jsonl"),
            summary,
            _json(pruned / "network.json", dict),
            _json(pruned / "units.json", dict),
            bench and [{"runtime": "eager", **row} for row in bench],
        )

    @property
    def name(self) -> str:
        """What the directory is called."""
        return self.directory.resolve().name

    @property
    def error(self) -> float | None:
        """The test error of the network handed over, in percent; None until the run finished."""
        if self.summary is None:
            return None
        error = self.summary["error"]
        return error["pruned"] if error["finetuned"] is None else error["finetuned"]

    @property
    def macs_ratio(self) -> float | None:
        """How many times fewer MACs that network has; None until the run finished."""
        return None if self.summary is None else self.summary["macs"]["ratio"]


def _json(path: Path, kind: type) -> Any:
    """A file's content, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} is damaged: {error}") from error
    if not isinstance(value, kind):
        raise RequestError(f"{path} is damaged: it holds no {kind.__name__}")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} is damaged: {error}") from error
    if not all(isinstance(line, dict) and {"phase", "epoch"} <= line.keys() for line in lines):
        raise RequestError(f"{path} is damaged: a line is none of an epoch")
    return lines
