"""The README.md of a pruned network, which the Hugging Face Hub shows as its model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

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
        title: its first line.
        library: what loads the network.
        load: Python code that loads it.
        num_parameters: the number of its parameters.
        results: from the name of a network to its values by their names, such as
            ``{"dense": {"accuracy": 0.93}, "pruned": {"accuracy": 0.92}}``; or only values.
        units: by gate its total, and the kept and zeroed indices, as `pyro_sbp.save` takes them.
        command: what produced the network.
        base_model: the name of the network on the Hub that was pruned.
        license: the license, by its name on the Hub.
    """
    # A value in JSON is one in YAML too.
    head: dict[str, Any] = {"library_name": library, "base_model": base_model, "license": license}
    head["tags"] = ["pruning", "structured-pruning", "pyro-sbp"]
    front = [f"{name}: {json.dumps(value)}" for name, value in head.items() if value is not None]
    parts = ["\n".join(["---", *front, "---"]), f"# {title}"]
    what = "A network that structured Bayesian pruning by pyro-sbp has made smaller."
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
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
