"""What recursive pruning does, turn by turn, from its records: a table a network and recipe.

python -m pyro_sbp.experiments.recursion [RECORD.json ...]

Medians over the seeds of a recipe. The records are made by `pyro_sbp.experiments.record`; the
ablation of the order is that of the recipes whose name ends in -reversed and -together.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyro_sbp.experiments.record import RESULTS

__all__ = ["tables"]


def _row(name: str, lines: Sequence[dict[str, Any]]) -> str:
    """A phase at its end, over the seeds."""
    units = "-".join(
        f"{statistics.median(line['units'][gate] for line in lines):.0f}"
        for gate in lines[0]["units"]
    )
    error = statistics.median(line["error"] for line in lines)
    seconds = statistics.median(line["seconds_per_epoch"] for line in lines)
    return f"| {name} | {lines[0]['epochs']} | {error:.2f} | {units} | {seconds:.1f} |"


def tables(records: Sequence[dict[str, Any]]) -> str:
    """Tables in Markdown, one for each network, data set, method and recipe."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = tuple(record[name] for name in ("arch", "dataset", "method", "recipe"))
        groups.setdefault(key, []).append(record)
    parts = []
    for (arch, dataset, method, recipe), runs in groups.items():
        ratio = statistics.median(run["macs"]["ratio"] for run in runs)
        minutes = statistics.median(run["train_seconds"] for run in runs) / 60
        seeds = ", ".join(str(run["seed"]) for run in runs)
        parts += [
            f"{arch}, {dataset}, {method}, recipe {recipe}, seeds {seeds}: "
            f"{ratio:.1f} times fewer MACs, {minutes:.1f} minutes",
            "",
            "| after | epochs | error, % | units | seconds an epoch |",
            "|---|---|---|---|---|",
            *(
                _row(phase["phase"], [run["phases"][index] for run in runs])
                for index, phase in enumerate(runs[0]["phases"])
            ),
            "",
        ]
    return "\n".join(parts)


def main(paths: list[str]) -> None:
    """Print the tables of some records, or of all that tell their phases."""
    chosen = [Path(path) for path in paths] or sorted(RESULTS.glob("*.json"))
    records = [json.loads(path.read_text("utf-8")) for path in chosen]
    print(tables([record for record in records if "phases" in record]))


if __name__ == "__main__":
    main(sys.argv[1:])
