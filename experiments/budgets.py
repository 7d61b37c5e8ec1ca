"""Measure networks that budgets select from finished runs: speed-ups, errors, int8.

    python -m pyro_sbp.experiments.budgets RUN ... [--data-dir DIR] [--parts PART ...]

For every run, the parts are:

- ``budgets``: the run is pruned with ``--speedup`` 2 and 4 at batch sizes 1 and 128, and with
  ``--max-error-increase 0.1`` if it has images for validation. The speed-up of every network is
  measured again in a new process. Budgets that cannot be met are recorded with their message.
- ``network``: the speed-up of the network of the run itself, in eager PyTorch and in ONNX Runtime,
  in a new process, and its profile by layer.
- ``variants``: the same with the channels-last memory format, and with ``--round-to auto`` if the
  run has measured latencies.
- ``compiled``: the same with torch.compile, which takes minutes.
- ``int8``: the network of the run in ONNX Runtime, in float32 and in int8.

ONNX Runtime needs ``pip install 'pyro-sbp[export]'``. All latencies are those of one CPU thread.
Nothing is fine-tuned. The run directory is only read. A record for each run is written to
`results/budgets/`, from which `python -m pyro_sbp.experiments.tables` makes the tables of
docs/budgets.md. Parts that are not measured again are kept from an existing record, which must have
the same command, machine, versions and CPU governor.

The runs on MNIST, which are not in the tables yet, are trained with::

    common="--dataset mnist --seed 0 --threads 1 --set holdout=5000 --set cut_every=4"
    small="--arch lenet5 --recipe lenet5-small $common"
    dense="--arch lenet-500-300 --recipe lenet-dense-small $common"
    latency="--weights runs/lenet5-macs/dense.pt --set cost='latency'"
    pyro-sbp train $small --output-dir runs/lenet5-macs
    pyro-sbp train $small --output-dir runs/lenet5-latency-128 $latency --set cost_batch_size=128
    pyro-sbp train $small --output-dir runs/lenet5-latency-1 $latency --set cost_batch_size=1
    pyro-sbp train $dense --output-dir runs/lenet-500-300
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_sbp.architectures import find_architecture
from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.deployment.loading import load
from pyro_sbp.deployment.speedup import Speedup
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.record import RESULTS, command, without_path
from pyro_sbp.experiments.rows import unreadable
from pyro_sbp.gates.layers import Select
from pyro_sbp.machine import cpu_governor
from pyro_sbp.pruning.macs import costs_by_layer
from pyro_sbp.training.again import prune_again
from pyro_sbp.training.files import write_json
from pyro_sbp.training.job import load_data, machine, versions
from pyro_sbp.training.latency_file import NAME as UNIT_LATENCY
from pyro_sbp.training.latency_file import read_unit_latency
from pyro_sbp.training.runs import read_request, read_saved_network
from pyro_sbp.training.summary import Summary

__all__ = ["DIRECTORY", "PARTS", "bench", "measured", "time_by_layer"]

DIRECTORY = RESULTS / "budgets"
#: The budgets of the table: speed-ups, batch sizes, and the increase of the error in points.
SPEEDUPS, BATCH_SIZES, INCREASE = (2.0, 4.0), (1, 128), 0.1


def bench(saved: Path, *options: str, batch_sizes: Sequence[int] = BATCH_SIZES) -> list[Any]:
    """The rows of `pyro-sbp bench` on one CPU thread, measured in a new process.

    Args:
        saved: the directory of a network, in a run directory.
        options: more options of `bench`.
        batch_sizes: the numbers of examples per call.
    """
    words = [sys.executable, "-m", "pyro_sbp.cli", "bench", str(saved), "--threads", "1", "--json"]
    for size in batch_sizes:
        words += ["--batch-size", str(size)]
    done = subprocess.run([*words, *options], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def time_by_layer(
    net: nn.Module, shape: Sequence[int], size: int, seconds: float = 1.0
) -> dict[str, float]:
    """The shortest time of every layer in a call of the network, in milliseconds.

    Other programs affect the shortest time of many calls less than the mean. It includes the
    overhead of one Python hook before and one after each layer.

    Args:
        net: the network, in evaluation mode.
        shape: the shape of one example.
        size: the batch size.
        seconds: the duration of the measurement.

    Returns:
        The milliseconds by layer. Those of a layer are the sum over its calls, with the `Select` of
        pruning. "other" is the time outside of the layers, such as that of activation functions,
        and "whole" is the time of the whole call.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        selects = isinstance(getattr(module, "select", None), Select)
        if (selects or not list(module.children())) and name.rpartition(".")[0] not in layers:
            layers[name] = module
    begun: dict[str, float] = {}
    spent = dict.fromkeys((*layers, "whole"), 0.0)
    hooks = []
    for name, module in layers.items():

        def before(*_: Any, name: str = name) -> None:
            begun[name] = time.perf_counter()

        def after(*_: Any, name: str = name) -> None:
            spent[name] += 1e3 * (time.perf_counter() - begun[name])

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    x = torch.rand(size, *shape, device="cpu")
    calls: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < end or len(calls) < 5:
            spent = dict.fromkeys(spent, 0.0)
            start = time.perf_counter()
            net(x)
            spent["whole"] = 1e3 * (time.perf_counter() - start)
            calls.append(spent)
    for hook in hooks:
        hook.remove()
    for call in calls:
        call["other"] = call["whole"] - sum(call[name] for name in layers)
    return {name: min(call[name] for call in calls) for name in (*layers, "other", "whole")}


class Measurement:
    """The parts that are measured of one run.

    Args:
        run: a copy of the run directory, in which networks are written.
        data: the data of the run.
        seconds: the time for which each network is measured per setting.
    """

    def __init__(self, run: Path, data: ImageData, seconds: float) -> None:
        self.run, self.data, self.seconds = run, data, seconds
        self.request = read_request(run)

    def _bench(self, saved: Path, *options: str, **more: Any) -> list[Any]:
        return bench(saved, "--seconds", str(self.seconds), *options, **more)

    def _pruned(self, name: str, **settings: Any) -> Summary:
        target = self.run / f"pruned-{name}"
        return prune_again(
            self.request,
            self.data,
            self.run,
            target,
            tell=lambda line: print(f"{name}: {line}", flush=True),
            **settings,
        )

    def budgets(self) -> list[dict[str, Any]]:
        """The targets of the budgets, and the measurements of their networks.

        Returns:
            For each budget {`budget`, `target`, `batch_size` (of a speed-up)} and, if it is met,
            {`macs_ratio`, `units`, `error` and `validation_error` (dense and pruned, in percent),
            `found` (the latency that the search measured last), `later` (the latency in a new
            process)}, otherwise {`refusal` (the message)}, `compared` (how many networks were
            compared) and `seconds`.
        """
        rows = []
        for target in SPEEDUPS:
            for size in BATCH_SIZES:
                budget = Speedup(target, batch_size=size)
                row = {"budget": "speedup", "target": target, "batch_size": size}
                name, start = f"speedup-{target:g}-batch-{size}", time.perf_counter()
                try:
                    row |= _sizes(self._pruned(name, budget=budget))
                    row["found"] = vars(budget.latencies[budget.level])
                    (row["later"],) = self._bench(self.run / f"pruned-{name}", batch_sizes=[size])
                except RequestError as refused:
                    row["refusal"] = str(refused)
                row |= {"compared": len(budget.measured), "seconds": time.perf_counter() - start}
                rows.append(row)
        if self.data_is_held_out:
            row = {"budget": "max_error_increase", "target": INCREASE}
            try:
                row |= _sizes(self._pruned("error", max_error_increase=INCREASE))
                row["later"] = self._bench(self.run / "pruned-error")
            except RequestError as refused:
                row["refusal"] = str(refused)
            rows.append(row)
        return rows

    @property
    def data_is_held_out(self) -> bool:
        """Whether the run reserves images for validation."""
        return self.request.recipe.holdout > 0

    def network(self) -> dict[str, Any]:
        """The latencies of the network of the run, and the time of its layers, dense and pruned."""
        constructor = find_architecture(self.request.arch).resolve()
        saved = self.run / "pruned"
        pruned = load(saved, constructor).eval()
        dense = constructor(**read_saved_network(saved)["kwargs"]).eval()
        shape = self.data.image_shape
        one = torch.rand(1, *shape, device="cpu")
        profile = {}
        for name, net in {"dense": dense, "pruned": pruned}.items():
            macs = {layer: cost[0] for layer, cost in costs_by_layer(net, one).items()}
            times = {size: time_by_layer(net, shape, size, self.seconds) for size in BATCH_SIZES}
            profile[name] = {"macs": macs} | {
                f"batch-{size}": found for size, found in times.items()
            }
        runtimes = ("--runtime", "eager", "--runtime", "onnxruntime")
        return {"latencies": self._bench(saved, *runtimes), "profile": profile}

    def variants(self) -> dict[str, Any]:
        """The latencies of the network of the run in other forms, by the name of the form."""
        saved = self.run / "pruned"
        found: dict[str, dict[str, Any]] = {
            "channels-last": {"latencies": self._bench(saved, "--channels-last")}
        }
        if (self.run / UNIT_LATENCY).exists():
            multiple = read_unit_latency(self.run).round_to()
            summary = self._pruned("rounded", round_to=multiple)
            latencies = self._bench(self.run / "pruned-rounded")
            found["round-to-auto"] = {
                "multiple": multiple,
                **_sizes(summary),
                "latencies": latencies,
            }
        return found

    def compiled(self) -> list[Any]:
        """The latencies of the network of the run with torch.compile."""
        return self._bench(self.run / "pruned", "--runtime", "compile")

    def int8(self) -> list[Any]:
        """The rows of `bench` in eager PyTorch and, in float32 and int8, in ONNX Runtime."""
        options = ("--runtime", "onnxruntime", "--runtime", "int8")
        return self._bench(self.run / "pruned", *options)


PARTS = ("budgets", "network", "variants", "compiled", "int8")
#: What all parts of a record have in common.
CONDITIONS = ("command", "machine", "versions", "governor")


def _sizes(summary: Summary) -> dict[str, Any]:
    """The sizes and errors of a network that was pruned again."""
    errors = {"error": summary.error, "validation_error": summary.validation_error}
    return {
        "macs_ratio": summary.macs.ratio,
        "units": {unit.gate: unit.kept for unit in summary.units},
        **{
            name: {"dense": found.dense, "pruned": found.pruned}
            for name, found in errors.items()
            if found is not None
        },
    }


def measured(
    run: Path, data_dir: Path | None = None, parts: Sequence[str] = PARTS, seconds: float = 2.0
) -> dict[str, Any]:
    """The record of a run.

    Args:
        run: the run directory; it is only read.
        data_dir: the directory of the data sets; by default that of the run.
        parts: what to measure, some of `PARTS`.
        seconds: the time for which each network is measured per setting.

    Raises:
        RequestError: the run has not finished, or its data cannot be read.
        ValueError: its recipe is not a named recipe.
    """
    entry = _described(run)
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / run.name
        shutil.copytree(run, copy)
        if data_dir is not None:  # for the commands in new processes
            asked = json.loads((copy / "recipe.json").read_text("utf-8"))
            write_json(copy / "recipe.json", {**asked, "data_dir": str(data_dir.resolve())})
        of_run = read_request(copy)
        data = load_data(of_run, device="cpu")
        measurement = Measurement(copy, data, seconds)
        for part in parts:
            print(f"{run.name}: {part}", flush=True)
            entry[part] = getattr(measurement, part)()
    return entry


def _described(run: Path) -> dict[str, Any]:
    """The record of a run without its parts."""
    request = read_request(run)
    summary = Summary.read(run / "summary.json")
    return {
        "run": run.name,
        "arch": request.arch,
        "dataset": without_path(request.dataset),
        "method": request.method,
        "recipe": request.recipe.name,
        "seed": request.seed,
        "cost": getattr(request.recipe, "cost", None),
        "cost_batch_size": getattr(request.recipe, "cost_batch_size", None),
        "command": command(request, changed=True),
        "error": vars(summary.error),
        "macs_ratio": summary.macs.ratio,
        "units": {unit.gate: unit.kept for unit in summary.units},
        "versions": versions(),
        "machine": machine(torch.device("cpu")),
        "governor": cpu_governor(),
    }


def _kept(path: Path, entry: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The parts of an existing record that can be in the same record as new ones.

    Args:
        path: the file of the record.
        entry: the new record, without its parts.
        parts: the names of the parts that are still to be measured.

    Raises:
        RequestError: the record is of another command, machine, version or governor, and has parts
            that are not measured again.
    """
    if not path.exists():
        return {}
    try:
        before = json.loads(path.read_text("utf-8"))
        old = {part: before[part] for part in PARTS if part in before}
        others = [name for name in CONDITIONS if before.get(name) != entry[name]]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise unreadable(path, "record of budgets", error) from error
    lost = [part for part in old if part not in parts]
    if others and lost:
        raise RequestError(
            f"{path} has {', '.join(lost)} with other values of {', '.join(others)}; measure these "
            "parts in the same call, or delete the file"
        )
    return {} if others else old


def main(arguments: Sequence[str]) -> None:
    """Measure runs, and write their records."""
    parser = argparse.ArgumentParser(
        prog="python -m pyro_sbp.experiments.budgets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run")
    parser.add_argument(
        "--data-dir", type=Path, help="the directory of the data sets; by default that of each run"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="seconds to measure each network; by default 2"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for run in options.runs:
        try:
            _measure_parts(run.resolve(), options.data_dir, options.parts, options.seconds)
        except ValueError as error:
            parser.error(str(error))


def _measure_parts(run: Path, data_dir: Path | None, parts: Sequence[str], seconds: float) -> None:
    """Measure parts of a run one after the other, and write the record after each of them."""
    path = DIRECTORY / f"{run.name}.json"
    for index, part in enumerate(parts):  # so that a part is kept if a later one is interrupted
        kept = _kept(path, _described(run), parts[index:])
        write_json(path, kept | measured(run, data_dir, [part], seconds))
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
