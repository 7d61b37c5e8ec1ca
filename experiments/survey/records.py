"""The records of the survey: one file for each collection."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.rows import unreadable
from pyro_sbp.experiments.survey.collections import COLLECTIONS
from pyro_sbp.training.files import write_text
from pyro_sbp.training.job import machine, versions

__all__ = ["DIRECTORY", "add", "command", "new", "path_of", "read"]

#: The directory of the records.
DIRECTORY = Path(__file__).parents[1] / "results" / "survey"


def _is_installed(name: str) -> bool:
    return find_spec(name.replace("-", "_")) is not None


def path_of(collection: str, directory: Path) -> Path:
    """The file of a collection."""
    return directory / f"{collection}.json"


def read(collection: str, directory: Path = DIRECTORY) -> dict[str, Any]:
    """The record of a collection.

    Raises:
        RequestError: there is none, or it cannot be read.
    """
    path = path_of(collection, directory)
    try:
        found = json.loads(path.read_text("utf-8"))
        found["networks"].items()
        return found
    except FileNotFoundError as error:
        raise RequestError(f"there is no record {path}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(path, "record of the survey", error) from error


def command(collection: str, against: str | None) -> str:
    """The command that measures a collection.

    Args:
        collection: one of `COLLECTIONS`.
        against: the library that also cuts the networks, or None.
    """
    words = f"python -m pyro_sbp.experiments.survey {collection}"
    return f"{words} --against {against}" if against else words


def new(collection: str, libraries: Sequence[str], against: str | None = None) -> dict[str, Any]:
    """An empty record of a collection.

    Args:
        collection: one of `COLLECTIONS`.
        libraries: the libraries whose versions are recorded.
        against: as for `command`.
    """
    assert collection in COLLECTIONS
    names = (*libraries, *((against,) if against else ()))
    return {
        "collection": collection,
        "command": command(collection, against),
        "versions": {
            **versions(),
            **{name: version(name) for name in names if _is_installed(name)},
        },
        "machine": machine(torch.device("cpu")),
        "networks": {},
    }


def add(record: dict[str, Any], name: str, row: dict[str, Any], directory: Path) -> None:
    """Add a network to a record, and write it.

    Args:
        record: the record, from `new` or `read`. It is changed in place.
        name: the name of the network.
        row: its measurements.
        directory: the directory of the file.
    """
    record["networks"][name] = row
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**record, "networks": None}, indent=1)
    # A line for each network.
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in record["networks"].items()
    )
    write_text(
        path_of(record["collection"], directory),
        text.replace('"networks": null', f'"networks": {{\n{lines}\n }}') + "\n",
    )
