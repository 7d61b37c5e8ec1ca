"""Functions that several commands use."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from pyro_sbp.errors import RequestError, unknown
from pyro_sbp.reasons import MOST
from pyro_sbp.recipes.criteria import CRITERIA
from pyro_sbp.text_tables import table
from pyro_sbp.training.runs import read_request, read_saved_network
from pyro_sbp.training.summary import Summary

__all__ = [
    "check_device",
    "check_torch_device",
    "closing_table",
    "criterion_option",
    "error_advice",
    "find_network",
    "find_run",
    "little_removed",
    "read_network",
    "result_in_words",
]

DEVICES = ("auto", "cpu", "cuda")
LITTLE_REMOVED = """\
Little was removed. To remove more, use more epochs, a larger kl_scale or a larger
noise_learning_rate in the recipe, or prune this network again with pyro-sbp prune."""
NOTHING_LEFT = """\
Nothing reaches the threshold, so almost nothing is left of the network. To keep more, use a
smaller threshold, or a smaller kl_scale or fewer epochs in the recipe."""
#: By how many percentage points pruning must raise the error for advice to be printed.
MUCH_ERROR = 5.0
#: Fewer steps with noise than this rarely remove much.
FEW_STEPS = 2000


#: The option of commands that show or prune a run by a criterion.
criterion_option = click.option(
    "--criterion",
    help=f"Criterion by which units are kept: {', '.join(CRITERIA)}.  [default: that of the run]",
)


def check_device(name: str, run: Path | None = None) -> str:
    """The device of a name, "cpu" or "cuda", without importing torch.

    Args:
        name: "cpu", "cuda", or "auto" for "cuda" where there is a CUDA device.
        run: the directory of an existing run that has this device; None for a device that the user
            chooses.

    Raises:
        RequestError: the name is unknown, or there is no such device.
    """
    if name not in DEVICES:
        raise RequestError(unknown("device", name, DEVICES))
    if name == "auto":
        return "cuda" if _cuda_devices() else "cpu"
    if name == "cuda" and not _cuda_devices():
        raise RequestError(_without_cuda("there is no CUDA device on this machine", run))
    return name


def check_torch_device(name: str, run: Path | None = None) -> None:
    """Raise RequestError if torch cannot use a device.

    Args:
        name: the device that `check_device` returned.
        run: as for `check_device`.
    """
    import torch  # imported here to keep `pyro-sbp --help` fast

    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError(_without_cuda("torch cannot use the CUDA device of this machine", run))


def _without_cuda(cause: str, run: Path | None) -> str:
    """The message for a missing CUDA device. The device of a run cannot be changed."""
    if run is None:
        return f"{cause}; use --device cpu"
    return f"{run} was made on a CUDA device, and {cause}; use a machine with a CUDA device"


def _cuda_devices() -> int:
    """The number of devices that the CUDA driver reports; 0 without a driver."""
    import ctypes  # imported here to keep `pyro-sbp --help` fast

    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def find_network(path: Path | None) -> tuple[Path, Path]:
    """The run directory and the saved network that a path names.

    Args:
        path: a run directory, for its network in ``pruned/``; a network that `prune` wrote into a
            run directory; or None for the newest run under ``runs/``.

    Raises:
        RequestError: there is no such run, it has not finished, or the network is not in a run
            directory.
    """
    if path is not None and (path / "network.json").is_file():
        path = Path(os.path.abspath(path))  # "." has no parent
        if not (path.parent / "recipe.json").is_file():
            raise RequestError(
                f"{path} is a saved network outside of a run directory; load it in Python with "
                "pyro_sbp.load, and use pyro_sbp.benchmark or torch.onnx.export"
            )
        return find_run(path.parent), path
    run = find_run(path)
    return run, run / "pruned"


def read_network(saved: Path) -> tuple[dict[str, Any], list[int]]:
    """The arguments of the constructor of a saved network, and the shape of one input.

    Raises:
        RequestError: ``network.json`` is missing or damaged.
    """
    network = read_saved_network(saved)
    if network["input_shape"] is None:
        raise RequestError(f"{saved}/network.json does not have the shape of the inputs")
    return network["kwargs"], network["input_shape"]


def find_run(run: Path | None, finished: bool = True) -> Path:
    """The run directory to use.

    Args:
        run: a run directory, or None for the newest run under ``runs/``.
        finished: whether the run must have finished.

    Raises:
        RequestError: there is no such run, or it has not finished.
    """
    if run is None:
        found = sorted(Path("runs").glob("*/recipe.json"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise RequestError("there is no run under runs/; start one with `pyro-sbp train`")
        run = found[-1].parent
    read_request(run)
    if finished and not (run / "summary.json").is_file():
        raise RequestError(f"{run} has not finished; resume with `pyro-sbp train --resume {run}`")
    return run


def little_removed(steps: int) -> str:
    """Advice for a run that removed little.

    Args:
        steps: the number of training steps in which each gate had noise.
    """
    if steps >= FEW_STEPS:
        return LITTLE_REMOVED
    number = f"{steps:,} step{'s' * (steps != 1)}"
    return (
        f"{LITTLE_REMOVED}\nEach gate had noise for {number}, but noise needs a few thousand. "
        "Smaller batches also give more steps."
    )


def _weights(summary: Summary) -> str:
    """The weights that remain, by layer, for a method that removes weights."""
    weights, files = summary.weights, summary.files
    if weights is None:
        return ""
    size = weights.in_words
    if files is not None:
        size += f"; the file has {files.pruned:,} bytes,"
        if files.sparse is not None:
            size += f" {files.sparse:,} without its zeros,"
        size += f" that of the dense network {files.dense:,}"
    return (
        f"{table(('layer', 'weights', 'of'), weights.rows())}\n\n{size}.\n"
        "Zeros alone do not make the network faster. Units that no weight reads are removed, which "
        "does; they are listed below."
    )


def closing_table(summary: Summary, hint: str = "", weak: str = "under the threshold") -> str:
    """The result of a run as a text table.

    Args:
        summary: the result.
        hint: the advice if little was removed.
        weak: the description of the units of a gate in which no unit reached the threshold.
    """
    weights = _weights(summary)
    units = table(("gate", "kept", "of", "zeroed"), summary.unit_rows())
    errors = table(*summary.error_table())
    sizes = table(("", "dense", "pruned", "ratio"), summary.size_rows())
    words = "no weight reads a unit of {gate}: one column of zeros remains"
    words = words if weights else f"all units of {{gate}} are {weak}: only the best is kept"
    held = [words.format(gate=gate) for gate in summary.held]
    left = summary.not_prunable(MOST)
    little = hint if summary.macs.ratio < 1.05 and not weights else ""
    nothing = NOTHING_LEFT if summary.nothing_left else ""
    parts = (weights, units, "\n".join(held), "\n".join(left), errors, sizes, little, nothing)
    return "\n\n".join(part for part in parts if part)


def error_advice(summary: Summary) -> str:
    """Advice if pruning increased the test error by much, and the network was not fine-tuned.

    This happens if a budget removes units whose scores are over the default threshold.
    """
    errors = summary.error
    if errors.mean is None or errors.pruned is None or errors.finetuned is not None:
        return ""
    points = errors.pruned - errors.mean
    if points < MUCH_ERROR:
        return ""
    return (
        f"Pruning raised the test error by {points:.1f} points. Use --finetune-epochs, give a "
        "smaller ratio, or train the noise for more epochs."
    )


def result_in_words(summary: Summary) -> str:
    """The sizes and the error of the final network, compared with those of the dense network."""
    sizes = (summary.macs, summary.parameters)
    macs, parameters = (f"{100 * size.pruned / max(1, size.dense):.3g} %" for size in sizes)
    words = f"The pruned network has {macs} of the MACs and {parameters} of the parameters."
    last, dense = summary.error.last, summary.error.dense
    if last is None:
        return words
    of_dense = "" if dense is None else f"; that of the dense network is {dense:.2f} %"
    return f"{words} Its test error is {last:.2f} %{of_dense}."
