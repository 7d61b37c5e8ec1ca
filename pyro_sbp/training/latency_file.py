"""The latencies of the units of a run, in its file `unit_latency.json`."""

from __future__ import annotations

import json
from pathlib import Path

from pyro_sbp.deployment.unit_latency import UnitLatency
from pyro_sbp.errors import RequestError
from pyro_sbp.training.files import write_json

__all__ = ["NAME", "read_unit_latency", "write_unit_latency"]

NAME = "unit_latency.json"


def write_unit_latency(directory: Path, found: UnitLatency) -> None:
    """Write the latencies into a run directory, atomically."""
    write_json(directory / NAME, found.to_dict())


def read_unit_latency(directory: Path) -> UnitLatency:
    """Read the latencies of a run.

    Raises:
        RequestError: there is no such file, because the run was not trained with the cost
            "latency", or the file is damaged.
    """
    path = directory / NAME
    try:
        return UnitLatency.from_dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError as error:
        raise RequestError(
            f"{directory} has no {NAME}; a run measures latencies if its recipe has "
            'cost = "latency"'
        ) from error
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
