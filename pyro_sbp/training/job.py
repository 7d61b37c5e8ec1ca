"""The network, the data and the method of a request."""

from __future__ import annotations

import dataclasses
import os
import pkgutil
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pyro_sbp.architectures import find_architecture
from pyro_sbp.datasets.loading import ImageData, load_dataset
from pyro_sbp.datasets.standardization import Standardization
from pyro_sbp.deployment.benchmarking import device_name
from pyro_sbp.deployment.weight_files import load_weights
from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.gates.attention import has_attention, separate_attention
from pyro_sbp.gates.calling import call
from pyro_sbp.methods import Method
from pyro_sbp.pruning.macs import count_macs, count_parameters
from pyro_sbp.recipes.method_recipes import METHODS
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.devices import dtype_of
from pyro_sbp.training.teachers import Teachers, check_teacher

__all__ = [
    "Job",
    "build_network",
    "load_data",
    "machine",
    "prepare_data",
    "prepare_job",
    "versions",
    "with_weights",
]


def versions() -> dict[str, str]:
    """The versions of the packages on which a result depends."""
    names = ("pyro-sbp", "torchvision", "pyro-ppl")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: version(name) for name in names},
    }


def machine(device: torch.device) -> str:
    """The machine on which a result depends: processor or graphics card, cores and threads."""
    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    return f"{device_name(device)}, {os.cpu_count()} cores, {threads}"


def load_data(
    request: Request,
    data_dir: Path | None = None,
    *,
    workers: int | None = None,
    device: str | torch.device | None = None,
) -> ImageData:
    """Load the data of a request, in the image size of the request or of its architecture.

    Args:
        request: the request.
        data_dir, device: the directory of the data sets and the device, as for `load_dataset`; by
            default those of the request.
        workers: as for `load_dataset`.

    Raises:
        RequestError: as for `load_dataset`.
    """
    size = request.image_size or find_architecture(request.arch).image_size
    data_dir = Path(request.data_dir) if data_dir is None else data_dir
    device = request.device if device is None else device
    return load_dataset(request.dataset, data_dir, size, workers, device)


def prepare_data(request: Request, data: ImageData, device: torch.device) -> ImageData:
    """Move the data to a device, and apply the settings of the recipe to it.

    Raises:
        RequestError: `crop` is too large for the images, or `holdout` reserves too many of them.
    """
    recipe = request.recipe
    if recipe.crop >= min(data.image_shape[1:]):
        height, width = data.image_shape[1:]
        raise RequestError(
            f"crop is {recipe.crop}; expected less than the images' {height} x {width}"
        )
    data = data.to(device)
    if recipe.random_labels:
        data = data.with_random_labels(request.seed)
    if recipe.holdout:
        data = data.held_out(recipe.holdout)
    if request.standardize_by is not None:
        return data.standardized(Standardization.of(**request.standardize_by))
    return data.standardized() if recipe.standardize else data


def build_network(request: Request, data: ImageData) -> tuple[nn.Module, dict[str, Any]]:
    """Build the untrained network of a request from its seed.

    Returns:
        The network, and the arguments of its constructor.

    Raises:
        RequestError: the network cannot be built, or does not accept the images of the data.
    """
    torch.manual_seed(request.seed)
    architecture = find_architecture(request.arch)
    kwargs = architecture.kwargs(data.image_shape[0], len(data.classes), data.image_shape[-1])
    example, _ = data.test.batch(slice(0, 8))
    return _build(architecture.resolve(), kwargs, example, len(data.classes)), kwargs


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A request with its network, data and method. The sizes are those of the dense network."""

    request: Request
    data: ImageData
    example: Tensor
    kwargs: dict[str, Any]
    method: Method
    macs: int
    parameters: int

    def pruned(self) -> tuple[nn.Module, int]:
        """The smaller network of the method, in float32 and contiguous memory, and its MACs."""
        small = self.method.small.to(torch.float32).to(memory_format=torch.contiguous_format)
        return small, count_macs(small, self.example[:1].float())


def prepare_job(
    request: Request, data: ImageData, directory: Path, fabric: Fabric, taught: bool = True
) -> Job:
    """Build the network and the method of a request. Nothing is written.

    Args:
        request, data, directory, fabric: as for `Loop`, with the data as `load_dataset` returns it.
        taught: whether to read the teachers of the request, which only fine-tuning needs.

    Raises:
        RequestError: the network cannot be built, or the network, the data, the weights or a
            teacher do not fit the request.
    """
    data = prepare_data(request, data, fabric.device)
    # Build the teachers before the network of the run: building that network sets the seed for all
    # later random numbers.
    teacher = _teacher(request, data) if taught else None
    dense, kwargs = build_network(request, data)
    example, _ = data.test.batch(slice(0, 8))
    # A run that resumes does not need the file: its checkpoint has later weights.
    if request.weights is not None and not (directory / "checkpoint.pt").exists():
        dense = with_weights(dense, Path(request.weights), len(data.classes))
    if has_attention(dense):
        dense = separate_attention(dense)
    dtype = dtype_of(request.precision)
    dense, example = dense.to(dtype), example.to(dtype)
    if request.channels_last:
        dense = dense.to(memory_format=torch.channels_last)
    try:
        method = pkgutil.resolve_name(METHODS[request.method])(
            dense.to(fabric.device),
            example,
            request.recipe,
            len(data.train),
            find_architecture(request.arch).input_features,
        )
    except ValueError as error:
        raise RequestError(str(error)) from error
    if teacher is not None:
        method.teacher = teacher.to(fabric.device, dtype)
    macs, parameters = count_macs(dense, example[:1]), count_parameters(dense)
    return Job(request, data, example, kwargs, method, macs, parameters)


def _teacher(request: Request, data: ImageData) -> Teachers | None:
    """The dense networks of the runs that the request names as teachers."""
    networks, names = [], []
    for name in request.teachers:
        other = check_teacher(Path(name), request)
        net, _ = build_network(other, data)
        networks.append(with_weights(net, Path(name) / "dense.pt"))
        names.append(other.arch)
    return Teachers(networks, names) if networks else None


def with_weights(net: nn.Module, path: Path, classes: int | None = None) -> nn.Module:
    """The network with the weights of a file.

    The file has the weights of the network as its constructor builds it, or with separate
    attention, as in a run. If the file is of a network with another number of classes, the last
    layer keeps its initial values, and a `UserWarning` says so.

    Args:
        net: the network.
        path: the file.
        classes: the number of classes of the data. With None, a file with another last layer raises
            an error.

    Raises:
        RequestError: the file cannot be read, or belongs to another network.
    """
    if not has_attention(net):
        load_weights(net, path, classes)
        return net
    separate = separate_attention(net)
    try:
        load_weights(separate, path, classes)
    except RequestError:
        load_weights(net, path, classes)
        return net
    return separate


def _build(
    constructor: Callable[..., nn.Module], kwargs: Any, example: Tensor, classes: int
) -> nn.Module:
    try:
        net = constructor(**kwargs)
    except Exception as error:  # a network's own code may raise anything
        given = ", ".join(kwargs) or "no arguments"
        raise RequestError(
            f"the network cannot be built from {given}: {first_line(error)}"
        ) from error
    if not isinstance(net, nn.Module):
        raise RequestError(f"--arch builds a {type(net).__name__}; expected a torch.nn.Module")
    try:
        with torch.no_grad():
            output = call(net.eval(), example.cpu())
    except Exception as error:  # a network's own code may raise anything
        raise RequestError(
            f"the network does not accept images of {list(example.shape[1:])}: {first_line(error)}"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < classes:
        found = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise RequestError(
            f"the network does not return logits [batch, {classes}], one column per class: it "
            f"returns {found} for {len(example)} images; an argument num_classes of its "
            "constructor gets the number of classes"
        )
    return net
