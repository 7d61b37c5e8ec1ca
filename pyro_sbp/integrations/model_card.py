"""The README.md of a pruned network, which the Hugging Face Hub shows as its model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_sbp.text_tables import markdown_table

__all__ = ["model_card"]


def model_card(
    title: str,
    *,
    library: str = "pyro-sbp",
    load: str = "",
    num_parameters: int | None = None,
    results: Mapping[str, Any] | None = None,
    units: Mapping[str, Mapping[str, Any]] | None = None,
    command: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The text of a model card.

    Args:
        title: the title, which is the first line.
        library: the library that loads the network.
        load: Python code that loads it.
        num_parameters: the number of parameters of the network.
        results: from the name of a network to named values, such as ``{"dense": {"accuracy": 0.93},
            "pruned": {"accuracy": 0.92}}``; or a mapping of named values.
        units: by gate, the total number of units and the indices of the kept and the zeroed units,
            as for `pyro_sbp.save`.
        command: the command that produced the network.
        base_model: the name of the network on the Hub that was pruned.
        license: the name of the license on the Hub.
    """
    # Every JSON value is a YAML value.
    head: dict[str, Any] = {"library_name": library, "base_model": base_model, "license": license}
    head["tags"] = ["pruning", "structured-pruning", "pyro-sbp"]
    front = [f"{name}: {json.dumps(value)}" for name, value in head.items() if value is not None]
    parts = ["\n".join(["---", *front, "---"]), f"# {title}"]
    what = "A network that was pruned with pyro-sbp (structured Bayesian pruning)."
    if num_parameters is not None:
        what += f" It has {num_parameters:,} parameters."
    parts.append(what)
    if load:
        parts += ["## Load", f"```python\n{load}\n```"]
    if results:
        parts += ["## Results", _results(results)]
    if units:
        parts += ["## Units", _units(units)]
    if command:
        parts += ["## Command", f"```sh\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def _results(results: Mapping[str, Any]) -> str:
    if not all(isinstance(row, Mapping) for row in results.values()):
        return _table(["", "value"], list(results.items()))
    columns = list(dict.fromkeys(name for row in results.values() for name in row))
    rows = [[name, *(row.get(column, "") for column in columns)] for name, row in results.items()]
    return _table(["", *columns], rows)


def _units(units: Mapping[str, Mapping[str, Any]]) -> str:
    rows: list[Sequence[Any]] = [
        [f"`{gate}`", unit["total"], len(unit["kept"]), len(unit["zeroed"])]
        for gate, unit in units.items()
    ]
    return _table(["gate", "units", "kept", "zeroed"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    return markdown_table([_cell(name) for name in head], [list(map(_cell, row)) for row in rows])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
