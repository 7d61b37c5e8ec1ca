"""Train LeNet-500-300 with one change at a time: `python -m pyro_sbp.experiments.ablation RUNS`.

All networks have nearly the same number of MACs (`--target-macs-ratio`), so that only their errors
have to be compared. The errors are those of 10,000 training images that are held out; test images
are not used. Without a change, the recipe is `lenet-dense-smallest`, with cuts every 5 epochs to
save time. Changes that do not concern dense training start from the dense network of that run.

Every run has its own directory in RUNS, and a run that was stopped is resumed. A record for each
run is written to `results/ablation/`, from which `python -m pyro_sbp.experiments.tables` makes the
table `ablation`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.record import RESULTS
from pyro_sbp.experiments.rows import markdown, unreadable
from pyro_sbp.training.files import write_json

__all__ = ["CHANGES", "main", "table"]

DIRECTORY = RESULTS / "ablation"

RATIO = 31
HELD_OUT = 10_000
_RECIPE = "lenet-dense-smallest"
_COMMON = ("--arch", "lenet-500-300", "--dataset", "mnist", "--recipe", _RECIPE)
#: The settings that change dense training.
_OF_DENSE_TRAINING = {"dense_epochs", "average", "label_smoothing", "optimizer", "crop"}
#: The seeds of the dense networks that are teachers.
_TEACHERS = (100, 101, 102)


@dataclass(frozen=True)
class Change:
    """A change of the recipe.

    Attributes:
        title: its description in the table.
        settings: the changed settings, as for `--set`.
        criterion: the criterion by which the run that is cut only at the end ("no-cuts") is pruned
            again and fine-tuned, instead of a new run.
        teachers: whether an ensemble of dense networks is the teacher in fine-tuning.
    """

    title: str
    settings: tuple[str, ...] = ()
    criterion: str | None = None
    teachers: bool = False

    @property
    def of_dense_training(self) -> bool:
        """Whether dense training changes."""
        names = {setting.partition("=")[0] for setting in self.settings}
        return bool(names & _OF_DENSE_TRAINING)


#: The changes by name. "base" is the recipe itself.
CHANGES = {
    "base": Change("none"),
    "dense": Change("dense training for 40 epochs, not 10", ("dense_epochs=40",)),
    "average": Change("averaged weights in dense training and fine-tuning", ("average=0.999",)),
    "trained-out": Change("both of these", ("dense_epochs=40", "average=0.999")),
    "shifted": Change("images shifted by at most one pixel", ("crop=1",)),
    "smoothing": Change("label smoothing of 0.1 in dense training", ("label_smoothing=0.1",)),
    "decay": Change("AdamW, weight decay 0.01", ("optimizer='adamw'", "weight_decay=0.01")),
    "finetuning": Change("fine-tuning for 40 epochs, not 20", ("finetune_epochs=40",)),
    "labels": Change("fine-tuning by labels, without a teacher", ("distill=0",)),
    "teachers": Change("an ensemble of three dense networks as teacher", teachers=True),
    "example": Change("noise for every example", ("noise_per='example'",)),
    "rising": Change("a KL weight that rises for 10 epochs", ("kl_rising_epochs=10",)),
    "inputs": Change(
        "twice the KL weight for input pixels", ("kl_scale={fc1_input=15.0, fc1=7.5, fc2=7.5}",)
    ),
    "slow": Change("noise learning rate 0.01, not 0.03", ("noise_learning_rate=0.01",)),
    "long": Change("120 epochs with noise, not 40", ("epochs=120",)),
    "slow-long": Change("both of these", ("noise_learning_rate=0.01", "epochs=120")),
    "no-cuts": Change("units are removed only at the end", ("cut_every=0",)),
    "snr": Change("the same run, pruned again by the signal-to-noise ratio", criterion="snr"),
    "bmrs-n": Change("the same run, pruned again by BMRS-N", criterion="bmrs-n"),
}
#: The errors of a run that the table shows, by their keys in a record.
_ERRORS = ("dense", "pruned", "finetuned")


class _Result(NamedTuple):
    """The held-out errors of a run in percent, and its MACs ratio."""

    dense: float
    pruned: float
    finetuned: float
    macs_ratio: float


def _settings(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _command(*words: str) -> str:
    """Run a command of pyro-sbp, and return its output.

    Raises:
        RequestError: the command failed.
    """
    command = [sys.executable, "-m", "pyro_sbp.cli", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RequestError(f"pyro-sbp {' '.join(words)} failed with status {done.returncode}")
    return done.stdout


def _train(run: Path, options: Sequence[str], data_dir: Path) -> None:
    """Train a run, or resume it. Nothing is done if it is finished."""
    if (run / "summary.json").exists():
        return
    if (run / "checkpoint.pt").exists():
        _command("train", "--resume", str(run))
    else:
        place = ("--data-dir", str(data_dir), "--threads", "1", "--output-dir", str(run))
        _command("train", *_COMMON, *options, *place)


def _options(change: Change, seed: int) -> list[str]:
    """The options of `pyro-sbp train` for a run, without those of its teachers."""
    common = ["--target-macs-ratio", str(RATIO), "--seed", str(seed)]
    cuts = () if "cut_every=0" in change.settings else ("cut_every=5",)
    return common + _settings(f"holdout={HELD_OUT}", *cuts, *change.settings)


def _teachers(runs: Path, data_dir: Path) -> list[str]:
    """Train the teachers, and return the options that name them."""
    words = []
    for seed in _TEACHERS:
        run = runs / f"teacher-{seed}"
        settings = ("dense_epochs=40", "average=0.999", "epochs=1", "finetune_epochs=0")
        options = _settings(f"holdout={HELD_OUT}", "distill=0", *settings)
        _train(run, [*options, "--seed", str(seed)], data_dir)
        words += ["--teacher", str(run)]
    return words


def measured(name: str, seed: int, runs: Path, data_dir: Path) -> dict[str, Any]:
    """Train the network of a change, if it is not trained, and return its record.

    Args:
        name: the name of the change in `CHANGES`.
        seed: the seed of the run.
        runs: the directory of the run directories.
        data_dir: the directory of MNIST.

    Returns:
        {`change`, `seed`, `command`, `macs_ratio`, `error` (held out, in percent: {`dense`,
        `pruned`, `finetuned`}), `seconds` of the training, `versions`, `machine`}.

    Raises:
        RequestError: a command failed.
    """
    change = CHANGES[name]
    trained = name if change.criterion is None else "no-cuts"
    run, settings = runs / f"{trained}-{seed}", CHANGES[trained]
    options = _options(settings, seed)
    if settings.teachers:
        options += _teachers(runs, data_dir)
    if trained != "base" and not settings.of_dense_training:
        _train(runs / f"base-{seed}", _options(CHANGES["base"], seed), data_dir)
        options += ["--weights", str(runs / f"base-{seed}" / "dense.pt")]
    _train(run, options, data_dir)
    found, asked = (
        json.loads((run / name).read_text("utf-8")) for name in ("summary.json", "recipe.json")
    )
    command = ["pyro-sbp", "train", *_COMMON, *options]
    if change.criterion is not None:
        again = ["--criterion", change.criterion, "--macs-ratio", str(RATIO)]
        again += ["--finetune-epochs", "20"]
        for unfinished in run.glob(f"pruned-{change.criterion}-*"):
            shutil.rmtree(unfinished)
        found |= json.loads(_command("prune", str(run), *again, "--json"))
        command += ["&&", "pyro-sbp", "prune", "RUN", *again]
    return {
        "change": name,
        "seed": seed,
        "command": " ".join(command).replace(f"{runs}/", ""),
        "macs_ratio": found["macs"]["ratio"],
        "error": found["validation_error"],
        "seconds": found["train_seconds"],
        "versions": asked["versions"],
        "machine": asked["machine"],
    }


def table() -> str:
    """The held-out errors of every change, as means over the seeds.

    Raises:
        RequestError: there is no record, a record cannot be read, or the run without a change is
            missing for a seed.
    """
    found: dict[str, dict[int, _Result]] = {name: {} for name in CHANGES}
    for path in sorted(DIRECTORY.glob("*.json")):
        try:
            entry = json.loads(path.read_text("utf-8"))
            dense, pruned, finetuned = (entry["error"][kind] for kind in _ERRORS)
            result = _Result(dense, pruned, finetuned, entry["macs_ratio"])
            found[entry["change"]][entry["seed"]] = result
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable(path, "record of the ablation", error) from error
    base = found["base"]
    cells = []
    for name, results in found.items():
        if not results:
            continue
        if missing := results.keys() - base.keys():
            raise RequestError(f"{DIRECTORY} has no record base-{min(missing)}.json")
        differences = [result.finetuned - base[seed].finetuned for seed, result in results.items()]
        numbers = [statistics.mean(values) for values in zip(*results.values(), strict=True)]
        cells.append(
            (
                CHANGES[name].title,
                *(f"{number:.2f}" for number in numbers[:3]),
                "" if name == "base" else f"{statistics.mean(differences):+.2f}",
                f"{numbers[3]:.1f}x",
                str(len(results)),
            )
        )
    if not cells:
        raise RequestError(f"there is no record in {DIRECTORY}")
    head = ("change", "dense", "pruned", "fine-tuned", "difference", "MACs", "seeds")
    return markdown(head, cells)


def main(arguments: list[str] | None = None) -> None:
    """Train what has no record, one seed after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="directory of the run directories")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="directory of MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    options = parser.parse_args(arguments)
    for seed in options.seeds:
        for name in options.changes:
            path = DIRECTORY / f"{name}-{seed}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                entry = measured(name, seed, options.runs, options.data_dir)
                write_json(path, entry)
                print(f"{name}, seed {seed}: {entry['error']}", flush=True)


if __name__ == "__main__":
    main()
