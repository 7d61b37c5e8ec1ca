"""Compare the criteria on finished runs: units, MACs and errors, pruned and fine-tuned.

    python -m pyro_sbp.experiments.criteria RUN ... [--data-dir DIR] [--finetune-epochs N]

Each run is pruned by every criterion at its default threshold (that of the recipe for the recipe's
own criterion), from the same posterior, and then fine-tuned with the settings of its recipe: the
same epochs (or N), learning rate, teacher and order of the data. The run directory is only read. A
record for each run is written to `results/criteria/`, from which
`python -m pyro_sbp.experiments.tables` makes the table of docs/criteria.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.streaming import workers_watched
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.record import RESULTS, file_name, record
from pyro_sbp.experiments.rows import METHODS, markdown, title, unreadable
from pyro_sbp.recipes.criteria import CRITERIA
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.again import replayed, tune_again
from pyro_sbp.training.files import write_json
from pyro_sbp.training.job import load_data, machine, versions
from pyro_sbp.training.runs import read_request

__all__ = ["compared", "table"]

DIRECTORY = RESULTS / "criteria"


@workers_watched()
def compared(
    request: Request, data: ImageData, directory: Path, finetune_epochs: int
) -> list[dict[str, Any]]:
    """A run's network by every criterion, pruned and fine-tuned.

    Args:
        request, data, directory: of the run, as for `train`.
        finetune_epochs: epochs of fine-tuning of every network, which take most of the time.

    Returns:
        For each criterion {`criterion`, `threshold`, `units` (kept, by gate), `macs`, `ratio`,
        `error` (the test error in percent: {`pruned`, `finetuned`}, in which `finetuned` is None
        after 0 epochs)}.

    Raises:
        RequestError: the run has no complete checkpoint, or its method does not have these
            criteria.
    """
    rules = [request.recipe.rule(name) for name in CRITERIA]
    rows = []
    with (
        replayed(request, data, directory, finetune_epochs > 0) as (job, loop),
        tempfile.TemporaryDirectory() as other,
    ):
        loop.directory = Path(other)  # no run resumes from these checkpoints
        for criterion, threshold in rules:
            job.method.prune(criterion=criterion.name, threshold=threshold)
            loop.recalibrate()
            loop.evaluation.measure("pruned", job.method.small)
            errors = loop.evaluation.errors["test"]
            errors["finetuned"] = None
            kept = {name: int(units.kept.sum()) for name, units in job.method.units.items()}
            if finetune_epochs:
                tune_again(job, loop, finetune_epochs)
            _, macs = job.pruned()
            rows.append(
                {
                    "criterion": criterion.name,
                    "threshold": threshold,
                    "units": kept,
                    "macs": macs,
                    "ratio": job.macs / macs,
                    "error": {name: errors[name] for name in ("pruned", "finetuned")},
                }
            )
    return rows


def _run(run: Path, data_dir: Path | None, epochs: int | None) -> Path:
    """Compare the criteria on a run, and write the record."""
    request = read_request(run)
    epochs = request.recipe.finetune_epochs if epochs is None else epochs
    trained = record(run)
    names = ("arch", "dataset", "method", "recipe", "seed", "command")
    entry = {**{name: trained[name] for name in names}, "finetune_epochs": epochs}
    path = DIRECTORY / file_name(*(entry[key] for key in ("arch", "dataset", "recipe", "seed")))
    _check_replaceable(path, entry)
    data = load_data(request, data_dir)
    entry |= {
        "criteria": compared(request, data, run, epochs),
        "versions": versions(),
        "machine": machine(torch.device(request.device)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, entry)
    return path


def _check_replaceable(path: Path, entry: dict[str, Any]) -> None:
    """Raise RequestError if a new record would replace one of more fine-tuning or of another
    command."""
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text("utf-8"))
        epochs, command = before["finetune_epochs"], before["command"]
        more = epochs > entry["finetune_epochs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, "record of criteria", error) from error
    if command != entry["command"]:
        raise RequestError(f"{path} is the record of another command; delete it to replace it")
    if more:
        raise RequestError(
            f"{path} has {epochs} epochs of fine-tuning, more than {entry['finetune_epochs']}; "
            "delete it to replace it"
        )


def table() -> str:
    """The criteria on every recorded run, with the commands below the table."""
    cells, notes = [], []
    for path in sorted(DIRECTORY.glob("*.json")):
        try:
            entry = json.loads(path.read_text("utf-8"))
            cells += [_cells(entry, row, index) for index, row in enumerate(entry["criteria"])]
            used = ", ".join(f"{name} {number}" for name, number in entry["versions"].items())
            tuned = f"fine-tuned for {entry['finetune_epochs']} epochs"
            notes.append(f"- `{entry['command']}`; {tuned}; {used}; {entry['machine']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable(path, "record of criteria", error) from error
    if not cells:
        raise RequestError(f"there is no record in {DIRECTORY}")
    head = ("run", "criterion", "threshold", "units", "MACs", "fewer", "pruned, %", "fine-tuned, %")
    return f"{markdown(head, cells)}\n\n" + "\n".join(notes)


def _cells(entry: dict[str, Any], row: dict[str, Any], index: int) -> tuple[str, ...]:
    """A line of the table. The first line of a run has its name."""
    name = f"{title(entry['arch'], entry['dataset'])}, {METHODS[entry['method']]}"
    last = row["error"]["finetuned"]
    return (
        "" if index else f"{name}, `{entry['recipe']}`, seed {entry['seed']}",
        row["criterion"],
        f"{row['threshold']:g}",
        "-".join(map(str, row["units"].values())),
        f"{row['macs']:,}",
        f"{row['ratio']:.2f}x",
        f"{row['error']['pruned']:.2f}",
        "-" if last is None else f"{last:.2f}",
    )


def main(arguments: list[str]) -> None:
    """Write the records of comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run")
    parser.add_argument(
        "--data-dir", type=Path, help="the directory of the data sets; by default that of each run"
    )
    parser.add_argument(
        "--finetune-epochs",
        type=int,
        metavar="N",
        help="epochs of fine-tuning; by default those of the recipe",
    )
    options = parser.parse_args(arguments)
    try:
        for run in options.runs:
            print(_run(run, options.data_dir, options.finetune_epochs))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
