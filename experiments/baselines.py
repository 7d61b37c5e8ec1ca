"""Baselines by Torch-Pruning, with the network, data, seed, epochs and MACs of a run of pyro-sbp.

    python -m pyro_sbp.experiments.baselines --importance taylor experiments/results/RECORD.json ...
    python -m pyro_sbp.experiments.baselines --arch lenet5 --importance magnitude --seed 1 10 20

An argument is the record of a run, or a MACs ratio. If the run used an image folder, run the
command in the directory where the run was made. For a ratio, the recipe is the default recipe of
the network or that of `--recipe`.

The dense phase has the epochs of the recipe. It ends at the same network as the dense phase of the
run, because the initial weights and the order of the data are the same, in float32. The network is
then trained for as many epochs as the run has with noise and in fine-tuning together. In the first
half of these epochs it is pruned in steps (`--steps`, by default ten), because iterative pruning is
what the library offers for high ratios. Every step removes the same share of the MACs. Learning
rates are those of the recipe. They are constant until the last step, and decay in the last share
of the remaining epochs that the recipe sets. Each phase has a separate optimizer. The learning rate
is the recipe's `learning_rate`, or after the dense phase that of `--learning-rate`. The labels are
those of the data, without soft labels.

With `--weights` the dense network is read from a file, and there is no dense phase. If the run of a
record started from weights, `--weights` must give the file of these weights.

Units are ranked over all layers together (`global_pruning`), by their importance divided by its
mean in the layer, which is the default of the library. Every layer keeps its best unit, and the
layer of the logits is not pruned. Torch-Pruning cannot remove input features. If the run has a gate
on the input pixels, as for LeNet-500-300, the baseline reaches the same MACs by hidden units alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pyro_sbp.architectures import find_architecture
from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.streaming import workers_watched
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.extra import check_installed
from pyro_sbp.experiments.record import (
    RESULTS,
    command,
    file_name,
    made_by,
    short_path,
    without_path,
)
from pyro_sbp.experiments.rows import unreadable
from pyro_sbp.experiments.torch_pruning import IMPORTANCES, prune_to, widths
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.methods import Phase
from pyro_sbp.methods.phased import PhasedTraining
from pyro_sbp.methods.plain import PlainPhase
from pyro_sbp.pruning.macs import count_macs, count_parameters
from pyro_sbp.recipes.named import RECIPES, default_recipe
from pyro_sbp.recipes.request import PRECISIONS, Request
from pyro_sbp.text_tables import shortest
from pyro_sbp.training.devices import dtype_of, launch
from pyro_sbp.training.files import write_json
from pyro_sbp.training.job import (
    build_network,
    load_data,
    machine,
    prepare_data,
    versions,
    with_weights,
)
from pyro_sbp.training.loop import Loop
from pyro_sbp.training.progress import Progress, ignore

__all__ = ["STEPS", "baseline"]


#: The default number of pruning steps.
STEPS = 10


#: The number of batches for the gradients of Taylor importance, as in the examples of the library.
GRADIENT_BATCHES = 10


class _TorchPruning(PhasedTraining):
    """The method for the training loop: dense training, pruning in steps, fine-tuning.

    Attributes:
        small: the network in its current state.
        gates: the gates of the dense network, for checkpoints.
        not_prunable: the layers whose units reach the logits.
    """

    def __init__(
        self,
        net: nn.Module,
        data: ImageData,
        request: Request,
        ratio: float,
        importance: str,
        steps: int,
        learning_rate: float | None,
    ) -> None:
        self.learning_rate = learning_rate
        self.net = self.small = net
        self.data, self.recipe = data, request.recipe
        self.ratio, self.importance, self.steps = ratio, IMPORTANCES[importance](), steps
        self.dtype = dtype_of(request.precision)
        self.example = data.test.batch(slice(0, 2))[0].to(self.dtype)
        self.macs, self.parameters = count_macs(net, self.example[:1]), count_parameters(net)
        self.total = widths(net)
        self.gates = find_gates(net, self.example)
        reasons = self.gates.not_prunable.items()
        self.not_prunable = {n: why for n, why in reasons if "reaches an output" in why}
        self.order = torch.Generator().manual_seed(request.seed)
        self.epochs = self.recipe.epochs + self.recipe.finetune_epochs
        most = max(1, self.epochs // 2)
        if not 1 <= steps <= most:
            raise RequestError(f"steps is {steps}; expected 1 to {most}, half of the epochs")
        if not self.recipe.dense_epochs and request.weights is None:
            raise RequestError(
                f"the recipe {self.recipe.name!r} has no dense epochs, and so no network to prune"
            )

    def phases(self) -> Iterator[Phase]:
        """The phases in order. Each phase is created when it begins, from the results of the
        earlier phases.
        """
        if self.recipe.dense_epochs:
            rate = self.recipe.learning_rate
            yield self._plain("dense", self.recipe.dense_epochs).changed(learning_rate=rate)
        begins = [step * (self.epochs // 2) // self.steps for step in range(self.steps)]
        for step, (begin, end) in enumerate(pairwise(begins), 1):
            self._prune(step)
            yield self._plain(f"step {step}", end - begin).changed(decays=False)
        self._prune(self.steps)
        yield self._plain("pruned", 0)  # measures its error
        yield self._plain("finetuned", self.epochs - begins[-1])

    def _plain(self, name: str, epochs: int) -> Phase:
        rate, units = self.learning_rate, widths(self.small)
        return PlainPhase(name, epochs, self.small, self.recipe, units, learning_rate=rate)

    def posteriors(self) -> dict[str, Any]:
        """An empty dict, because there is no noise."""
        return {}

    def _prune(self, step: int) -> None:
        """Reduce the MACs of the network by a factor that is the same in every step."""
        self._take_gradients()
        macs = self.macs / self.ratio ** (step / self.steps)
        self.small = prune_to(
            self.small, macs, self.example, self.importance, list(self.not_prunable), step
        )

    def _take_gradients(self) -> None:
        """Compute the gradients of the training loss over some batches, and leave them in the
        parameters.
        """
        net, size = self.small.eval(), self.recipe.batch_size
        net.zero_grad()
        drawn = torch.randperm(len(self.data.train), generator=self.order)
        with closing(self.data.train.batches(drawn.split(size)[:GRADIENT_BATCHES])) as batches:
            for x, y in batches:
                F.cross_entropy(net(x.to(self.dtype)), y).backward()


@workers_watched()
def baseline(
    request: Request,
    data: ImageData,
    ratio: float,
    importance: str,
    steps: int = STEPS,
    watch: Callable[[Progress], None] = ignore,
    learning_rate: float | None = None,
) -> dict[str, Any]:
    """Train, prune and fine-tune a network by Torch-Pruning.

    Args:
        request: the network, the recipe, the seed, the weights and the device. The method is
            ignored.
        data: the data, from `load_data`.
        ratio: the smallest factor by which the MACs are reduced.
        importance: a name of `IMPORTANCES`.
        steps: the number of pruning steps.
        watch: called with the progress.
        learning_rate: the learning rate after the dense phase; by default that of the recipe.

    Returns:
        The record, without the command. Errors are those on the test set in percent. `error.pruned`
        is the error of the network after the last pruning step, before further training.

    Raises:
        RequestError: there are neither weights nor dense epochs, there are too few other epochs for
            the steps, or the network cannot be built.
        ValueError: the ratio is less than 1, or the network with one unit per layer has more MACs.
    """
    if not 1 <= ratio < float("inf"):
        raise ValueError(f"the MACs ratio is {ratio:g}; expected a number >= 1")
    fabric = launch(request.device, request.devices, request.precision)
    data = prepare_data(request, data, fabric.device)
    net, _ = build_network(request, data)
    if request.weights is not None:
        net = with_weights(net, Path(request.weights))
    net = net.to(fabric.device, dtype_of(request.precision))
    if request.channels_last:
        net = net.to(memory_format=torch.channels_last)
    method = _TorchPruning(net, data, request, ratio, importance, steps, learning_rate)
    with tempfile.TemporaryDirectory() as directory:  # no run resumes from these checkpoints
        loop = Loop(request, method, data, Path(directory), fabric, watch)
        loop.go()
    return _record(request, importance, method, loop)


def _record(request: Request, importance: str, method: _TorchPruning, loop: Loop) -> dict[str, Any]:
    """The record of a baseline after its training, without the command."""
    measured, learning_rate = loop.evaluation, method.learning_rate
    small, names = method.small, ("dense", "pruned", "finetuned")
    macs, parameters = count_macs(small, method.example[:1]), count_parameters(small)
    kept, recipe = widths(small), request.recipe
    return {
        "kind": "baseline",
        "arch": request.arch,
        "dataset": without_path(request.dataset),
        "method": f"torch-pruning {importance}",
        "seed": request.seed,
        "of": recipe.name,
        "settings": asdict(recipe),
        "steps": method.steps,
        **({} if learning_rate is None else {"learning_rate": learning_rate}),
        "epochs": {"dense": recipe.dense_epochs, "finetuned": method.epochs},
        "device": request.device,
        "train_seconds": round(loop.seconds, 1),
        "error": {name: measured.errors["test"][name] for name in names},
        **(
            {"validation_error": {name: measured.errors["validation"][name] for name in names}}
            if method.data.validation is not None
            else {}
        ),
        "calibration": {split: found for split, found in measured.calibration.items() if found},
        "units": [
            {"gate": name, "kept": kept[name], "total": total}
            for name, total in method.total.items()
            if name not in method.not_prunable
        ],
        "left_alone": method.not_prunable,
        "macs": {"dense": method.macs, "pruned": macs, "ratio": method.macs / macs},
        "parameters": {
            "dense": method.parameters,
            "pruned": parameters,
            "ratio": method.parameters / parameters,
        },
        "versions": {**versions(), "torch-pruning": version("torch-pruning")},
        "machine": machine(loop.device),
    }


def _of_record(path: Path, options: argparse.Namespace) -> tuple[Request, float]:
    """The request of the run of a record, and its MACs ratio."""
    try:
        found = json.loads(path.read_text("utf-8"))
        named = {key: found[key] for key in ("arch", "dataset", "seed", "recipe")}
        found["method"]  # only records of runs have a method
        ratio = found["macs"]["ratio"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, "record of a run", error) from error
    for key, value in named.items():
        given = getattr(options, key)
        if given is not None and given != value:
            raise RequestError(f"--{key} is {given}, but {path} is of {key} {value}; leave it out")
    if "started_from" in found and options.weights is None:
        raise RequestError(
            f"the run of {path} started from weights; give them by --weights. They were made by: "
            f"{found['started_from']}"
        )
    return _request(named, options), ratio


def _request(named: dict[str, Any], options: argparse.Namespace) -> Request:
    name = named.pop("recipe")
    if name not in RECIPES:
        raise RequestError(f"unknown recipe {name!r}; expected {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    return Request(
        recipe=recipe if options.weights is None else recipe.replace(dense_epochs=0),
        device=options.device,
        data_dir=str(options.data_dir),
        weights=options.weights,
        precision=options.precision,
        channels_last=options.channels_last,
        **named,
    )


def _of_ratio(options: argparse.Namespace) -> Request:
    """The request of a MACs ratio that was given as a number."""
    if options.arch is None:
        raise RequestError("a MACs ratio needs an --arch")
    dataset = options.dataset or find_architecture(options.arch).dataset
    if dataset is None:
        raise RequestError(f"--arch {options.arch} needs a --dataset")
    recipe = options.recipe or default_recipe(options.arch, dataset, "sbp").name
    named = {"arch": options.arch, "dataset": dataset, "seed": options.seed or 0, "recipe": recipe}
    return _request(named, options)


def _run(target: str, options: argparse.Namespace) -> Path:
    """Make the baseline for the file of a record or for a MACs ratio, and write its record."""
    try:
        ratio = float(target)
    except ValueError:
        request, ratio = _of_record(Path(target), options)
        what, last = "", f"experiments/results/{Path(target).name}"
    else:
        request, what = _of_ratio(options), f"-{shortest(ratio)}x"
        last = (
            f"--arch {request.arch} --dataset {without_path(request.dataset)} "
            f"--recipe {request.recipe.name} --seed {request.seed} {target}"
        )
    if options.steps != STEPS:
        what += f"-{options.steps}-steps"
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write to {options.output_dir}: {error.strerror}") from error
    start = {}
    if request.weights is not None:
        start["started_from"] = command(made_by(Path(request.weights)))
    data = load_data(request)
    entry = baseline(
        request, data, ratio, options.importance, options.steps, _tell, options.learning_rate
    )
    entry |= start
    entry["command"] = f"{_command(request, options)} {last}"
    name = file_name(
        *(request.arch, request.dataset, "baseline", options.importance),
        *(request.recipe.name + what, request.seed),
    )
    write_json(options.output_dir / name, entry)
    return options.output_dir / name


def _command(request: Request, options: argparse.Namespace) -> str:
    """The command of a baseline, without the network, the data and the ratio."""
    words = [f"python -m pyro_sbp.experiments.baselines --importance {options.importance}"]
    if request.device != "cpu":
        words.append(f"--device {request.device}")
    if request.channels_last:
        words.append("--channels-last")
    if request.precision != "32-true":
        words.append(f"--precision {request.precision}")
    if request.weights is not None:
        words.append(f"--weights {short_path(request.weights)}")
    if options.learning_rate is not None:
        words.append(f"--learning-rate {shortest(options.learning_rate)}")
    if options.steps != STEPS:
        words.append(f"--steps {options.steps}")
    return " ".join(words)


def _tell(progress: Progress) -> None:
    if progress.error is not None and progress.standing is not None:
        where = f"{progress.phase} {progress.epoch}/{progress.epochs}"
        units = dict(progress.standing.units)
        print(f"{where}: error {progress.error:.2f} %, units {units}", file=sys.stderr)


def main(arguments: list[str]) -> None:
    """Write the records of baselines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="RECORD_OR_RATIO",
        help="the record of a run, or a MACs ratio for the network of --arch",
    )
    parser.add_argument("--importance", choices=IMPORTANCES, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="the number of pruning steps")
    parser.add_argument("--arch", help="the network, for a ratio")
    parser.add_argument("--dataset")
    parser.add_argument("--recipe")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--weights", help="a file of weights, instead of the dense phase")
    parser.add_argument(
        "--learning-rate", type=float, help="the learning rate after the dense phase"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    try:
        check_installed("torch_pruning")
        for target in options.targets:
            print(_run(target, options))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
