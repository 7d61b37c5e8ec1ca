"""pyro-sbp train: train a network with noise, and prune it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pyro_sbp.architectures import ARCHITECTURES, find_architecture
from pyro_sbp.cli.common import (
    check_device,
    check_torch_device,
    closing_table,
    little_removed,
    result_in_words,
)
from pyro_sbp.cli.threads import threads_to_use
from pyro_sbp.cli.train_directory import check_free, default_directory
from pyro_sbp.cli.train_request import Options, new_request
from pyro_sbp.datasets.sources import SOURCES, check_dataset
from pyro_sbp.errors import RequestError, unknown
from pyro_sbp.recipes.criteria import CRITERIA
from pyro_sbp.recipes.method_recipes import METHODS
from pyro_sbp.recipes.named import RECIPES
from pyro_sbp.recipes.recipe import Recipe
from pyro_sbp.recipes.request import PRECISIONS, Request
from pyro_sbp.training.processes import is_first
from pyro_sbp.training.runs import read_request, read_threads
from pyro_sbp.training.summary import Summary

__all__ = ["train"]

#: The flags of options that may be repeated.
_FLAGS = {"settings": "set", "teachers": "teacher"}
#: The loggers, which are named like their extras; CSV files need none.
LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")


@click.command()
@click.option(
    "--arch",
    help=f"Network: {', '.join(ARCHITECTURES)}, timm:NAME, or package.module:callable for your "
    "own network. The callable returns a module that returns logits. If it has an argument "
    "num_classes, it gets the number of classes.",
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
    help="File with a state dict. The run starts from these weights and does not train a dense "
    "network. With --set dense_epochs=N, it first trains these weights for N epochs.",
)
@click.option(
    "--teacher",
    "teachers",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="RUN",
    help="Run whose dense network is the teacher in fine-tuning; may be repeated, and then the "
    "predictions of the teachers are averaged. The temperature is the setting distill, or 4 if the "
    "recipe has none.  [default: the network before its last "
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
    help="Number of epochs with noise. The settings kl_free_epochs, kl_rising_epochs and "
    "cut_every are scaled by the same factor.  [default: by the recipe]",
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
    help="Train a network with R times fewer MACs. The weights of the KL divergence are adjusted "
    "during training, and units are removed until the ratio R is reached.  "
    "[default: by the recipe]",
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
    """Train a network with noise on its units, and prune it.

    During training, the output of every unit is multiplied by random noise. Units that carry no
    signal are removed. A run has three phases, whose lengths the recipe sets: training without
    noise, training with noise, and fine-tuning of the pruned network.
    """
    if resume is None:
        given = Options(**options)
        request = new_request(given)
        directory = given.output_dir or default_directory(request)
        if is_first():
            check_free(directory)
    else:
        _check_resumed(resume, options)
        request, directory = read_request(resume), resume
    for name in loggers:
        if name not in LOGGERS:
            raise RequestError(unknown("logger", name, LOGGERS))
    find_architecture(request.arch)  # raises for one that is unknown
    check_dataset(request.dataset, Path(request.data_dir), workers)
    check_device(request.device, resume)
    recorded = None if resume is None else read_threads(resume)
    threads = threads_to_use(threads, request.devices, recorded)

    from pyro_sbp.cli.train_run import run  # imports torch

    check_torch_device(request.device, resume)
    summary, images = run(
        request,
        directory,
        title=_title(request, resumed=resume is not None),
        threads=threads,
        workers=workers,
        loggers=[n for n in LOGGERS if n in loggers or (directory / "logs" / n).is_dir()],
        quiet=as_json or not is_first(),
    )
    if not is_first():
        return
    if as_json:
        click.echo(json.dumps(summary.to_dict(), indent=2))
    else:
        click.echo(_result(summary, request.recipe, images, directory))


def _check_resumed(run: Path, options: Mapping[str, Any]) -> None:
    """Raise RequestError if a run has finished, or if options are given that the run has."""
    if (run / "summary.json").exists():
        raise RequestError(
            f"{run} is a finished run: nothing is left to do, and epochs cannot be added; "
            "train again with more --epochs and another --output-dir"
        )
    for name, value in options.items():
        if value not in (None, ()):
            flag = _FLAGS.get(name, name.replace("_", "-"))
            raise RequestError(f"--resume takes all settings from the run; leave out --{flag}")


def _title(request: Request, resumed: bool) -> str:
    """One line that says what is trained."""
    return (
        f"{'resuming' if resumed else 'training'} {request.arch} on {request.dataset}: "
        f"method {request.method}, recipe {request.recipe.name}, seed {request.seed}, "
        f"precision {request.precision}"
    )


def _result(summary: Summary, recipe: Recipe, images: int, directory: Path) -> str:
    """What is printed at the end: the tables, the result in words, and the next commands.

    Args:
        summary: the result.
        recipe: the recipe of the run.
        images: the number of training images.
        directory: the run directory.
    """
    steps_per_epoch = -(-(images - recipe.holdout) // recipe.batch_size)
    steps = recipe.epochs_per_gate(len(summary.units)) * steps_per_epoch
    return (
        f"{closing_table(summary, little_removed(steps))}\n"
        f"\n{result_in_words(summary)}\n"
        f"run directory: {directory}, network: {directory / 'pruned'}\n"
        f"next: `pyro-sbp bench {directory}` measures the latency, "
        f"`pyro-sbp report {directory}` writes a page with plots"
    )
