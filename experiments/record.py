"""Turn finished run directories into records: python -m pyro_sbp.experiments.record RUN ..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pyro_sbp.experiments.recipes import RECIPES, default_recipe
from pyro_sbp.recipes import Request

__all__ = ["record"]

RESULTS = Path(__file__).parent / "results"


def record(run: Path) -> dict[str, Any]:
    """The record of a run: its summary, and what it takes to repeat it.

    Raises:
        ValueError: the run was made with a recipe that has no name here.
    """
    asked = json.loads((run / "recipe.json").read_text("utf-8"))
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    request = Request.from_dict(asked)
    command = f"pyro-sbp train --arch {request.arch} --dataset {request.dataset}"
    if request.recipe != default_recipe(request.arch, request.dataset, request.method):
        if RECIPES.get(request.recipe.name) != request.recipe:
            raise ValueError(f"{run} used a recipe that is not in pyro_sbp.experiments.recipes")
        command += f" --recipe {request.recipe.name}"
    return {
        **summary,
        "recipe": request.recipe.name,
        "command": f"{command} --seed {request.seed}",
        "versions": asked["versions"],
        "machine": asked["machine"],
    }


def main(runs: list[str]) -> None:
    """Write the records of run directories into `experiments/results/`."""
    RESULTS.mkdir(exist_ok=True)
    for run in runs:
        entry = record(Path(run))
        name = "-".join(str(entry[key]) for key in ("arch", "dataset", "recipe", "seed")) + ".json"
        (RESULTS / name).write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
