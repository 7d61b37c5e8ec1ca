"""Convert finished run directories to records: `python -m pyro_sbp.experiments.record RUN ...`."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sbp.architectures import find_architecture
from pyro_sbp.errors import RequestError, damage
from pyro_sbp.recipes.named import RECIPES
from pyro_sbp.recipes.recipe import TEMPERATURE
from pyro_sbp.recipes.request import Request
from pyro_sbp.text_tables import shortest
from pyro_sbp.training.runs import read_request

if TYPE_CHECKING:
    from pyro_sbp.datasets.loading import ImageData

__all__ = [
    "RESULTS",
    "command",
    "file_name",
    "made_by",
    "phases",
    "pruned_again",
    "record",
    "short_path",
    "thresholds",
    "without_path",
]

RESULTS = Path(__file__).parent / "results"


def file_name(*parts: Any) -> str:
    """The name of the file of a record, from its network, its data set and other distinguishing
    parts.

    It has the last two names of ``package.module:callable``, and the name of the folder of
    ``folder:PATH``.
    """
    names = []
    for part in map(str, parts):
        start, colon, end = part.partition(":")
        if colon:
            part = Path(end).name if start == "folder" else f"{start.rpartition('.')[2]}-{end}"
        names.append(re.sub(r"[^A-Za-z0-9.]+", "-", part))
    return "-".join(names) + ".json"


def without_path(dataset: str) -> str:
    """The name of a data set in a record. For ``folder:PATH`` it has the name of the folder, not
    its path.
    """
    kind, colon, path = dataset.partition(":")
    return f"{kind}:{Path(path).name}" if colon else dataset


def short_path(weights: str) -> str:
    """The name of a file of weights in a record: that of its run directory and that of the file."""
    return "/".join(Path(os.path.abspath(weights)).parts[-2:])


def record(run: Path) -> dict[str, Any]:
    """The record of a run: its summary, and the facts that are needed to repeat it.

    For a run that started from the weights of another run, ``started_from`` is the command of that
    run, and ``taught_by`` are the commands of the runs of its teachers. ``latencies`` are those
    that `pyro-sbp bench` measured, if it did.

    Raises:
        RequestError: the directory is not that of a finished run, or a file in it is damaged.
        ValueError: no command repeats the run, see `command`, or the run started from weights that
            are not in a run directory.
    """
    request = read_request(run)
    asked, summary = (_json(run, name) for name in ("recipe.json", "summary.json"))
    start: dict[str, Any] = {}
    if request.weights is not None:
        start["started_from"] = command(made_by(Path(request.weights)))
    if request.teachers:
        start["taught_by"] = [command(made_by(Path(run) / "dense.pt")) for run in request.teachers]
    return {
        **summary,
        "dataset": without_path(request.dataset),
        "recipe": request.recipe.name,
        "settings": asked["recipe"],
        "phases": phases(run),
        "command": command(request),
        **start,
        "versions": asked["versions"],
        "machine": asked["machine"],
        **_latencies(run),
    }


def _text(run: Path, name: str) -> str:
    """The content of a file that every finished run has."""
    try:
        return (run / name).read_text("utf-8")
    except OSError as error:
        raise RequestError(f"{run} is not a finished run: {error}") from error


def _json(run: Path, name: str) -> Any:
    try:
        return json.loads(_text(run, name))
    except json.JSONDecodeError as error:
        raise RequestError(f"{run / name} is damaged: {damage(error)}") from error


def _latencies(run: Path) -> dict[str, Any]:
    """The latencies that `pyro-sbp bench` wrote into the run directory."""
    return {"latencies": _json(run, "bench.json")} if (run / "bench.json").exists() else {}


def made_by(weights: Path) -> Request:
    """The request of the run that created a file of weights.

    Raises:
        RequestError: the file is not in a run directory, or the `recipe.json` there is damaged.
    """
    if not (weights.parent / "recipe.json").is_file():
        raise RequestError(
            f"the run started from {weights}, which is not in a run directory; a record has "
            "to say how its weights were made"
        )
    return read_request(weights.parent)


def command(request: Request, changed: bool = False) -> str:
    """The command that repeats a request.

    It does not have `data_dir`, which differs between machines. It does not have `standardize_by`
    either, because `--arch` sets the same statistics.

    Args:
        request: the request.
        changed: whether settings may differ from those of the named recipe. They become options
            `--set`.

    Raises:
        ValueError: the recipe is not a named recipe, or has other settings without `changed`; or no
            option gives the images the size or the statistics of the request.
    """
    named = RECIPES.get(request.recipe.name)
    if named is not None and request.weights is not None:
        # The dense phase is omitted, because there are weights.
        named = named.replace(dense_epochs=0)
    if named is not None and request.teachers and not named.distill:
        # The option --teacher sets the temperature of a recipe without one.
        named = named.replace(distill=TEMPERATURE)
    if named is None or named.method != request.method or (request.recipe != named and not changed):
        raise ValueError(f"the recipe {request.recipe.name!r} is not that of pyro_sbp.recipes")
    words = [
        "pyro-sbp train",
        f"--arch {request.arch}",
        f"--dataset {without_path(request.dataset)}",
    ]
    if request.method != "sbp":
        words.append(f"--method {request.method}")
    words.append(f"--recipe {named.name}")
    before = named.to_dict()
    for name, value in request.recipe.to_dict().items():
        if value != before[name]:
            setting = f"{name}={_toml(value)}"
            quoted = '"' in setting or " " in setting
            words.append(f"--set {setting!r}" if quoted else f"--set {setting}")
    words += [word for word in _of_images(request) if word not in words]
    if request.weights is not None:
        words.append(f"--weights {short_path(request.weights)}")
    words += [f"--teacher {Path(os.path.abspath(run)).name}" for run in request.teachers]
    if request.device != "cpu":
        words.append(f"--device {request.device}")
    if request.devices != 1:
        words.append(f"--devices {request.devices}")
    if request.precision != "32-true":
        words.append(f"--precision {request.precision}")
    if request.channels_last:
        words.append("--channels-last")
    return " ".join([*words, f"--seed {request.seed}"])


def _of_images(request: Request) -> list[str]:
    """The options for the size and the statistics of images that `--arch` does not set."""
    words, size, statistics = [], None, None
    if request.arch.startswith("timm:"):
        config = find_architecture(request.arch).data_config()
        if config is not None:
            size = config.image_size
            statistics = {"mean": list(config.mean), "std": list(config.std)}
    if request.image_size != size:
        if request.image_size is None:
            raise ValueError(
                f"no command repeats the run: its images have their own size, and --arch "
                f"{request.arch} resizes them to {size}"
            )
        words.append(f"--image-size {request.image_size}")
    if request.standardize_by != statistics:
        if request.standardize_by is not None:
            raise ValueError(
                "no command repeats the run: no option sets the statistics of standardize_by"
            )
        words.append(f"--set standardize={_toml(request.recipe.standardize)}")
    return words


def _toml(value: Any) -> str:
    """A setting as `--set` reads it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {json.dumps(x)}" for name, x in value.items()) + "}"
    return json.dumps(value)


def pruned_again(run: Path, ratio: float, epochs: int) -> dict[str, Any]:
    """The record of a run that was pruned again to a ratio of MACs, and fine-tuned.

    The network is not kept.

    Args:
        run: the run directory.
        ratio: the ratio of MACs, as for ``pyro-sbp prune --macs-ratio``.
        epochs: the epochs of fine-tuning.

    Raises:
        RequestError: the run is not finished, or the ratio cannot be reached.
        ValueError: as for `record`.
    """
    from pyro_sbp.pruning.budgets import MacsRatio
    from pyro_sbp.training.again import prune_again
    from pyro_sbp.training.progress import ignore

    entry = record(run)
    request, data = _with_data(run)
    with tempfile.TemporaryDirectory() as other:
        summary = prune_again(
            request,
            data,
            run,
            Path(other) / "pruned",
            budget=MacsRatio(ratio),
            finetune_epochs=epochs,
            tell=ignore,
        )
    options = f"--macs-ratio {shortest(ratio)}" + f" --finetune-epochs {epochs}" * (epochs > 0)
    return {
        **{key: value for key, value in entry.items() if key not in ("phases", "latencies")},
        **summary.to_dict(),
        "dataset": entry["dataset"],
        "command": f"{entry['command']} && pyro-sbp prune RUN {options}",
        "pruned_again": {"macs_ratio": ratio, "finetune_epochs": epochs},
    }


def _with_data(run: Path) -> tuple[Request, ImageData]:
    """The request of a run, and its data."""
    from pyro_sbp.training.job import load_data

    request = read_request(run)
    return request, load_data(request)


def thresholds(run: Path) -> list[dict[str, Any]]:
    """The results of the run at other thresholds, from `sweep`. For a method that removes weights,
    they are a curve of error against compression.
    """
    from pyro_sbp.training.again import sweep

    request, data = _with_data(run)
    return sweep(request, data, run)


def phases(run: Path) -> list[dict[str, Any]]:
    """The error and the units at the end of every phase of a run, and the median seconds of its
    epochs.

    Raises:
        RequestError: the run has no metrics.
    """
    text = _text(run, "metrics.jsonl")
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, text.splitlines()):
        by_phase.setdefault(line["phase"], []).append(line)
    return [
        {
            "phase": name,
            "epochs": len(lines),
            "error": lines[-1]["error"],
            "units": lines[-1]["units"],
            "seconds_per_epoch": statistics.median(line["seconds"] for line in lines),
        }
        for name, lines in by_phase.items()
    ]


def main(arguments: list[str]) -> None:
    """Write the records of run directories into `experiments/results/`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--sweep", action="store_true", help="also measure other thresholds")
    parser.add_argument(
        "--macs-ratio", type=float, help="prune the runs again to this ratio, and record the result"
    )
    parser.add_argument(
        "--finetune-epochs", type=int, default=0, help="epochs of fine-tuning after --macs-ratio"
    )
    options = parser.parse_args(arguments)
    if options.sweep and options.macs_ratio is not None:
        parser.error("give --sweep or --macs-ratio, not both")
    RESULTS.mkdir(exist_ok=True)
    for run in options.runs:
        try:
            if options.macs_ratio is not None:
                entry = pruned_again(run, options.macs_ratio, options.finetune_epochs)
            else:
                entry = record(run)
            if options.sweep:
                entry["thresholds"] = thresholds(run)
        except (OSError, ValueError) as error:
            sys.exit(str(error))
        names = [entry[key] for key in ("arch", "dataset", "recipe", "seed")]
        if options.macs_ratio is not None:
            tuned = f"-finetuned-{options.finetune_epochs}" * (options.finetune_epochs > 0)
            names.insert(-1, f"macs-{shortest(options.macs_ratio)}{tuned}")
        name = file_name(*names)
        path = RESULTS / name
        if path.exists() and json.loads(path.read_text("utf-8"))["command"] != entry["command"]:
            sys.exit(f"{path} is the record of another command; delete it to replace it")
        path.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
