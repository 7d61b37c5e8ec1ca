"""pyro-sbp train: train a network with noise, and prune it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pyro_sbp.architectures import ARCHITECTURES, find_architecture
from pyro_sbp.cli.common import (
    check_device,
    closing_table,
    little_removed,
    result_in_words,
)
from pyro_sbp.cli.stopping import Stopped, StopWhenDone
from pyro_sbp.cli.threads import threads_to_use
from pyro_sbp.datasets.sources import SOURCES, check_dataset
from pyro_sbp.errors import OtherProcessError, RequestError, first_line, unknown
from pyro_sbp.recipes.criteria import CRITERIA
from pyro_sbp.recipes.named import RECIPES, default_recipe
from pyro_sbp.recipes.overrides import assigned_setting, with_overrides
from pyro_sbp.recipes.request import PRECISIONS, PixelStatistics, Precision, Request
from pyro_sbp.recipes.settings import METHODS, TEMPERATURE, Recipe, read_recipe
from pyro_sbp.training.files import LOCK
from pyro_sbp.training.processes import is_first, num_processes
from pyro_sbp.training.runs import read_request, read_threads

if TYPE_CHECKING:
    from pyro_sbp.datasets.loading import ImageData
    from pyro_sbp.training.loop import Progress

__all__ = ["train"]

#: The flags of options that may be repeated.
_FLAGS = {"settings": "set", "teachers": "teacher"}
#: The loggers, which are named like their extras; CSV files need none.
LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")


@click.command()
@click.option(
    "--arch",
    help=f"Network: {', '.join(ARCHITECTURES)}, timm:NAME, or package.module:callable, which is "
    "called without arguments, or with num_classes if it has it; its network returns logits.",
)
@click.option(
    "--dataset",
    help=f"Data set: {', '.join(SOURCES)}, digits, or folder:PATH, an image folder with train/ and "
    "test/.  [default: by --arch]",
)
@click.option(
    "--method", help=f"Method: {', '.join(METHODS)}.  [default: that of the recipe, or sbp]"
)
@click.option(
    "--recipe",
    help=f"Recipe: {', '.join(RECIPES)}, or a TOML file.  [default: by --arch and --dataset]",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="File of a state dict to start from, instead of training a dense network. With --set "
    "dense_epochs=N the dense network is trained from it.",
)
@click.option(
    "--teacher",
    "teachers",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="RUN",
    help="Run whose dense network is the teacher of fine-tuning, at the temperature distill (4 if "
    "the recipe has none); several runs are an ensemble.  [default: the network before its last "
    "cut]",
)
@click.option(
    "--image-size",
    type=click.IntRange(1),
    metavar="N",
    help="Height and width to which images are resized.  [default: that of the network, or of the "
    "data]",
)
@click.option(
    "--epochs",
    type=int,
    help="Number of epochs with noise; kl_free_epochs, kl_rising_epochs and cut_every change in "
    "proportion.  [default: by the recipe]",
)
@click.option("--batch-size", type=int, help="Examples per step.  [default: by the recipe]")
@click.option(
    "--learning-rate",
    type=float,
    help="Learning rate of the weights before pruning.  [default: by the recipe]",
)
@click.option(
    "--macs-weight",
    type=float,
    help="Weight of the MACs of units in the KL divergence.  [default: by the recipe]",
)
@click.option(
    "--target-macs-ratio",
    type=float,
    metavar="R",
    help="Reach R times fewer MACs: macs_weight is adjusted during training, and the units are "
    "chosen by R.  [default: by the recipe]",
)
@click.option(
    "--criterion",
    help=f"Criterion by which units are kept: {', '.join(CRITERIA)}.  [default: by the recipe]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a setting of the recipe, with a value as in a TOML file; may be repeated.",
)
@click.option("--seed", type=int, default=None, help="Seed of the random numbers.  [default: 0]")
@click.option("--device", default=None, help="Device: auto, cpu or cuda.  [default: auto]")
@click.option(
    "--devices",
    type=click.IntRange(1),
    help="Number of devices, with one process each.  [default: 1]",
)
@click.option(
    "--precision",
    help=f"Precision: {', '.join(PRECISIONS)}, or auto for the faster of the first two.  "
    "[default: 32-true]",
)
@click.option(
    "--channels-last/--no-channels-last",
    default=None,
    help="Use the channels-last memory format, which is faster on some devices.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads of each process.  [default: OMP_NUM_THREADS, or the number of free cores]",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Number of processes that read the images of a folder during training; 0 loads all images "
    "into memory.  [default: 0, or up to 4 if memory is short]",
)
@click.option(
    "--logger",
    "loggers",
    multiple=True,
    metavar="NAME",
    help=f"Log to {', '.join(LOGGERS)}, with files in RUN/logs; may be repeated. A resumed run "
    "continues its logs.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Directory of the data sets.  [default: data]",
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    help="The run directory.  [default: runs/ARCH-DATASET-METHOD]",
)
@click.option("--resume", type=click.Path(path_type=Path), help="Resume the run in this directory.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def train(
    resume: Path | None,
    as_json: bool,
    threads: int | None,
    workers: int | None,
    loggers: tuple[str, ...],
    **options: Any,
) -> None:
    """Train a network with noise, and prune it.

    The outputs of its units are multiplied by noise, and units that carry no signal are removed.
    """
    if resume is None:
        request = _request(**options)
        directory = options["output_dir"] or _directory(request)
        if is_first():
            _check_free(directory)
    else:
        if (resume / "summary.json").exists():
            raise RequestError(
                f"{resume} is a finished run: nothing is left to do, and epochs cannot be added; "
                "train again with more --epochs and another --output-dir"
            )
        given = [
            f"--{_FLAGS.get(name, name.replace('_', '-'))}"
            for name, value in options.items()
            if value not in (None, ())
        ]
        if given:
            raise RequestError(f"--resume takes all settings from the run; leave out {given[0]}")
        request, directory = read_request(resume), resume
    for name in loggers:
        if name not in LOGGERS:
            raise RequestError(unknown("logger", name, LOGGERS))
    architecture = find_architecture(request.arch)
    data_dir = Path(request.data_dir)
    check_dataset(request.dataset, data_dir, workers)
    check_device(request.device)
    recorded = None if resume is None else read_threads(resume)
    threads = threads_to_use(threads, request.devices, recorded)

    import torch

    from pyro_sbp.datasets.loading import load_dataset
    from pyro_sbp.datasets.streaming import StreamedSplit, WorkerDied
    from pyro_sbp.training import train as training
    from pyro_sbp.training.devices import launch, leave, on_first
    from pyro_sbp.training.loggers import check_logger, make_logger
    from pyro_sbp.training.loop import Interrupted

    if request.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("torch cannot use this machine's CUDA device; use --device cpu")
    names = [n for n in LOGGERS if n in loggers or (directory / "logs" / n).is_dir()]
    for name in names:
        check_logger(name)
    fabric = launch(request.device, request.devices, request.precision, threads)

    # From here on, a signal stops the run only after a checkpoint, because all processes must stop
    # together.
    with StopWhenDone() as stop:

        def load() -> ImageData:
            size, device = request.image_size or architecture.image_size, fabric.device
            return load_dataset(request.dataset, data_dir, size, workers, device)

        quiet = as_json or not is_first()
        data = on_first(fabric, load) or load()  # it may have to be downloaded, once
        if isinstance(data.train, StreamedSplit) and not quiet:
            readers = f"{data.train.workers} worker{'s' * (data.train.workers > 1)}"
            click.echo(f"images stay on disk, read by {readers}", err=True)
        with _Bar(quiet, _title(request, resumed=resume is not None)) as bar:
            try:
                logger = [make_logger(n, directory) for n in names] if is_first() else []
                summary = training.train(request, data, directory, bar.update, stop, fabric, logger)
            except Stopped as error:
                raise Stopped(error.number, _hint_at_once(directory)) from error
            except Interrupted as error:
                hint = f"stopped; resume with `pyro-sbp train --resume {directory}`"
                raise Stopped(stop.number or 0, hint) from error
            except (OSError, WorkerDied, OtherProcessError) as error:
                hint = f"; resume with `pyro-sbp train --resume {directory}`"
                kind = OSError if isinstance(error, OSError) else type(error)
                raise kind(first_line(error) + hint * _unfinished(directory)) from error
    leave()
    if not is_first():
        return
    if as_json:
        click.echo(json.dumps(summary.to_dict(), indent=2))
    else:
        examples, recipe = len(data.train) - request.recipe.holdout, request.recipe
        epochs = recipe.epochs_per_gate(len(summary.units))
        steps = epochs * -(-examples // recipe.batch_size)
        click.echo(closing_table(summary, little_removed(steps)))
        click.echo(
            f"\n{result_in_words(summary)}\n"
            f"run directory: {directory}, network: {directory / 'pruned'}\n"
            f"next: `pyro-sbp bench {directory}` measures the latency, "
            f"`pyro-sbp report {directory}` writes a page with plots"
        )


def _request(
    arch: str | None,
    dataset: str | None,
    method: str | None,
    recipe: str | None,
    seed: int | None,
    device: str | None,
    data_dir: Path | None,
    output_dir: Path | None,
    weights: Path | None,
    devices: int | None,
    precision: str | None,
    channels_last: bool | None,
    image_size: int | None,
    epochs: int | None,
    settings: Sequence[str],
    teachers: Sequence[Path],
    **changes: Any,
) -> Request:
    if arch is None:
        names = ", ".join(ARCHITECTURES)
        raise RequestError(
            f"--arch is missing; expected {names}, package.module:callable or timm:NAME"
        )
    architecture = find_architecture(arch)
    dataset = dataset or architecture.dataset
    if dataset is None:
        raise RequestError(f"--dataset is missing, and {arch} has no default data set")
    if method is not None and method not in METHODS:
        raise RequestError(unknown("method", method, METHODS))
    chosen = _recipe(recipe, arch, dataset, method)
    if method not in (None, chosen.method):
        raise RequestError(
            f"the recipe {chosen.name!r} is for {chosen.method}, and --method is {method}; "
            "leave out --method, or choose another recipe"
        )
    given = {name: value for name, value in changes.items() if value is not None}
    flags = {**given, "epochs": epochs}
    assigned = [assigned_setting(assignment) for assignment in settings]
    for setting, assignment in zip(assigned, settings, strict=True):
        if "=" in assignment and flags.get(setting) is not None:
            flag = setting.replace("_", "-")
            raise RequestError(f"--{flag} and --set {assignment} contradict each other; give one")
    if epochs is not None:
        chosen = chosen.with_epochs(epochs)
    chosen = with_overrides(chosen.replace(**given), settings)
    if weights is not None:
        if not weights.is_file():
            raise RequestError(f"--weights: there is no file {weights}")
        if "dense_epochs" not in assigned:
            chosen = chosen.replace(dense_epochs=0)
    if teachers:
        if not chosen.finetune_epochs:
            raise RequestError(
                "--teacher sets the labels of fine-tuning, but finetune_epochs is 0; expected more"
            )
        if not chosen.distill and "distill" not in assigned:
            chosen = chosen.replace(distill=TEMPERATURE)
    config = architecture.data_config()
    standardize_by: PixelStatistics | None = None
    if config is not None:
        image_size = image_size or config.image_size
        if "standardize" not in assigned:
            standardize_by = {"mean": list(config.mean), "std": list(config.std)}
    device = check_device(device or "auto")
    seed = 0 if seed is None else seed
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed is {seed}; expected an integer from 0 to 2^63 - 1")
    devices = devices or num_processes() or 1
    if devices > 1 and chosen.batch_size < 2 * devices:
        raise RequestError(
            f"batch size is {chosen.batch_size}; expected at least two examples for each of "
            f"{devices} devices"
        )
    return Request(
        arch,
        dataset,
        chosen,
        seed,
        device,
        str(data_dir or "data"),
        weights=None if weights is None else str(weights),
        devices=devices,
        precision=cast(Precision, _precision(precision or "32-true", device)),
        channels_last=bool(channels_last),
        image_size=image_size,
        standardize_by=standardize_by,
        teachers=tuple(map(str, teachers)),
    )


def _precision(name: str, device: str) -> str:
    """The precision of a name, which may be "auto"."""
    if name != "auto":
        if name not in PRECISIONS:
            raise RequestError(unknown("precision", name, (*PRECISIONS, "auto")))
        return name
    from pyro_sbp.training.devices import fastest_precision  # imports torch

    return fastest_precision(device)


def _recipe(name: str | None, arch: str, dataset: str, method: str | None) -> Recipe:
    if name is None:
        return default_recipe(arch, dataset, method or "sbp")
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".toml"):
        return read_recipe(Path(name), method)
    hint = f"; did you mean '{name}.toml'?" if Path(f"{name}.toml").is_file() else ""
    raise RequestError(unknown("recipe", name, RECIPES, " or a .toml file", hint))


def _directory(request: Request) -> Path:
    words = (request.arch, request.dataset, request.method)
    return Path("runs") / "-".join(word.replace("/", "_").replace(":", "_") for word in words)


def _check_free(directory: Path) -> None:
    if directory.is_file():
        raise RequestError(f"{directory} is a file; give another --output-dir")
    if directory.exists() and any(path.name != LOCK for path in directory.iterdir()):
        hint = f"resume it with --resume {directory}, or " if _unfinished(directory) else ""
        if (directory / "summary.json").exists():
            hint = f"it contains a finished run (pyro-sbp inspect {directory} shows it); "
        raise RequestError(f"{directory} is not empty: {hint}give another --output-dir")
    parent = directory
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RequestError(f"cannot write {directory}: {parent} is not a writable directory")


def _title(request: Request, resumed: bool) -> str:
    """One line that says what is trained."""
    return (
        f"{'resuming' if resumed else 'training'} {request.arch} on {request.dataset}: "
        f"method {request.method}, recipe {request.recipe.name}, seed {request.seed}, "
        f"precision {request.precision}"
    )


def _hint_at_once(directory: Path) -> str:
    """The message after a second signal."""
    if not _unfinished(directory):
        return "stopped at once"
    resume = f"pyro-sbp train --resume {directory}"
    if not (directory / "checkpoint.pt").exists():
        return f"stopped at once, before the first checkpoint; start again with `{resume}`"
    return f"stopped at once, without the steps since the last checkpoint; resume with `{resume}`"


def _unfinished(directory: Path) -> bool:
    return (directory / "recipe.json").exists() and not (directory / "summary.json").exists()


class _Bar:
    """Prints a title when the training begins, then a progress bar on a terminal, or else one line
    per epoch."""

    def __init__(self, quiet: bool, title: str) -> None:
        self.quiet, self.title = quiet, title
        self.bar: Any = None
        self.key: tuple[str, int] | None = None

    def __enter__(self) -> _Bar:
        self.live = not self.quiet and sys.stderr.isatty()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, progress: Progress) -> None:
        if self.quiet:
            return
        if self.title:
            click.echo(self.title, err=True)
            self.title = ""
        text = f"loss {progress.loss:.4f} (nll {progress.nll:.4f}"
        text += f" + weighted kl {progress.weighted_kl:.4f})"
        standing = progress.standing
        if progress.error is not None and standing is not None:
            left = "-".join(str(count) for count in standing.units.values())
            text += f"  error {progress.error:.2f} %  units {left}"
            if standing.macs is not None:
                text += f"  expected MACs {standing.macs:,.0f}"
            if standing.held:
                text += f"  (all under the threshold: {', '.join(standing.held)})"
        title = f"{progress.phase} {progress.epoch}/{progress.epochs}"
        if not self.live:
            if progress.error is not None:
                click.echo(f"{title:>16}  {text}", err=True)
            return
        from tqdm import tqdm

        if self.key != (progress.phase, progress.epoch):
            if self.bar is not None:
                self.bar.close()
            self.bar = tqdm(total=progress.steps, desc=f"{title:>16}", ncols=0, unit="step")
            self.key = (progress.phase, progress.epoch)
        self.bar.n = progress.step
        self.bar.set_postfix_str(text)
