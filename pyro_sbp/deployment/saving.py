"""Save pruned networks to files without pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from pyro_sbp.datasets.standardization import Standardization
from pyro_sbp.deployment import file_sets
from pyro_sbp.deployment.configurations import (
    CONFIG,
    build_from_config,
    config_of,
    takes_config,
    with_sizes_of,
)
from pyro_sbp.deployment.constructors import name_of, resolve
from pyro_sbp.deployment.description import INDEX, Description
from pyro_sbp.deployment.differences import changed_buffers, resized_layers, smaller_sizes
from pyro_sbp.deployment.file_sets import part
from pyro_sbp.deployment.kept_units import UNITS, units_from_dicts
from pyro_sbp.deployment.rebuilding import check_fit, resize_layers, settle_lazy_layers
from pyro_sbp.deployment.shared_tensors import under_all_names, unique_tensors
from pyro_sbp.deployment.sparse_files import write_sparse
from pyro_sbp.errors import first_line
from pyro_sbp.gates.attention import Attention, has_attention, separate_attention
from pyro_sbp.gates.noise import check_no_noise
from pyro_sbp.gates.units import units_as_dicts

__all__ = ["NetworkFiles", "network_files", "save"]


#: The metadata of ``model.safetensors``, which transformers expects.
METADATA = {"format": "pt"}
#: The files of a saved network; some are optional.
FILES = ("model.safetensors", "sparse.safetensors", INDEX, CONFIG, UNITS)


def save(
    small: nn.Module,
    directory: str | os.PathLike[str],
    constructor: Callable[..., nn.Module] | str,
    kwargs: Mapping[str, Any] | None = None,
    units: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    overwrite: bool = False,
    standardization: Standardization | None = None,
    sparse: bool = False,
) -> None:
    """Write a pruned network to a directory.

    ``model.safetensors`` contains the tensors. ``network.json`` contains the constructor, the
    differences from the network that it builds, the names of frozen parameters, and a SHA-256
    checksum of every file. ``units.json`` contains the units if they are given, or if `prune` has
    set them on the network.

    For a model of Hugging Face transformers, ``config.json`` contains its configuration. If every
    layer has kept the same number of units, the configuration has the new numbers, and transformers
    can load the directory without pyro-sbp.

    A new directory appears only when all of its files are complete. With `overwrite`, the directory
    contains a complete network at all times, even if the process is killed: the old one until the
    new one is complete, and then the new one. An interrupted call may leave files whose names end
    in ``.part``. Do not delete such files in the directory, because the saved network may need
    them. The next `save` to the directory renames or replaces them. A directory ``NAME.*.part``
    next to the new directory can be deleted after its process has ended. `save` does not delete it,
    because the process may run on another machine.

    `save` stores the parameters and buffers with their values and types, which of them share a
    tensor, and which parameters are frozen. An attribute of a module that is an integer or a tuple
    of integers, such as a number of heads, is stored if it has become smaller in the same ratio as
    a layer inside. Other attributes that were set after construction, such as the probability of a
    dropout layer, are not stored. Hooks, gradients and memory formats are not stored either.

    Args:
        small: the network, from `prune` or `shrink`.
        directory: the directory to write. Without `overwrite`, it must not exist, or must be empty.
        constructor: the function or class that builds the original network, or its name
            ``module:callable``. For a model of transformers it is the class, ``type(model)``.
        kwargs: the arguments of the constructor, plain values, without the configuration.
        units: by gate, the total number of units, and the indices of the kept and the zeroed units:
            ``{"fc1": {"total": 4, "kept": [0, 3], "zeroed": []}}``. The default is the attribute
            `units` that `prune` has set on the network.
        input_shape: the shape of one example. It is stored as information for users of the network.
        overwrite: whether to replace a saved network in the directory.
        standardization: the standardization of images in [0, 1] that the network expects. It is
            stored as information for users of the network.
        sparse: whether to write ``sparse.safetensors`` too, which stores no zeros. Either file is
            enough to load the network.

    Raises:
        FileExistsError: the directory is not empty, and `overwrite` is not set or the directory
            contains other files than a saved network.
        ValueError: the constructor builds a network with other layers, the network has values that
            the files cannot store, the noise of a `Pruner` is attached to the network, or `units`
            has another format.
        OSError: a file cannot be written.
    """
    path = Path(directory)
    _check_free(path, overwrite)
    files = network_files(
        small,
        constructor,
        kwargs,
        units=units,
        input_shape=input_shape,
        standardization=standardization,
        sparse=sparse,
    )
    files.write(path)


def _check_free(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError if a directory has files that `save` must not replace."""
    there = {file.name for file in path.iterdir()} if path.exists() else set()
    there -= {part(path / name).name for name in FILES}
    if there and not (overwrite and there <= set(FILES)):
        hint = "it contains other files" if overwrite else "give another, or overwrite=True"
        raise FileExistsError(f"{path} is not empty: {hint}")


@dataclass(frozen=True)
class NetworkFiles:
    """The files of a saved network, before they are written.

    Attributes:
        description: the content of the index, without checksums.
        writers: from the name of every other file to a function that writes it to a path.
    """

    description: Description
    writers: Mapping[str, Callable[[Path], object]]

    def write(self, path: Path) -> None:
        """Write the files to a directory, and replace a network that is saved in it.

        Other files in the directory are not changed.

        Raises:
            OSError: a file cannot be written.
        """
        try:
            if path.exists():
                _complete(path)
                old = set(FILES) - {*self.writers, INDEX}
                file_sets.replace(path, self.writers, INDEX, self.index, old)
            else:
                self._write_new(path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot write {path}: {first_line(error)}") from error

    def index(self, checksums: Mapping[str, str]) -> str:
        """The content of the index, with the checksums of the other files."""
        return dataclasses.replace(self.description, checksums=checksums).to_json()

    def _write_new(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A unique name, because another process may save a network with the same name.
        unique = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part"))
        partial = unique / path.name
        try:
            partial.mkdir()  # with the usual permissions, unlike the directory of mkdtemp
            file_sets.replace(partial, self.writers, INDEX, self.index)
            os.replace(partial, path)
        finally:
            shutil.rmtree(unique, ignore_errors=True)
        file_sets.sync(path.parent)


def _complete(path: Path) -> None:
    """Complete an earlier `save` to this directory that was interrupted."""
    if any(part(path / name).exists() for name in FILES):
        with contextlib.suppress(ValueError):  # a damaged network can be replaced too
            file_sets.complete(path, Description.read(path / INDEX).checksums or {})


def network_files(
    small: nn.Module,
    constructor: Callable[..., nn.Module] | str,
    kwargs: Mapping[str, Any] | None = None,
    *,
    units: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    standardization: Standardization | None = None,
    sparse: bool = False,
) -> NetworkFiles:
    """The files of a network. The arguments are those of `save`.

    Raises:
        ValueError: as for `save`.
    """
    check_no_noise(small, "saved")
    original = _original(small, constructor, kwargs)
    description, tensors = _described(small, original)
    description = dataclasses.replace(
        description,
        input_shape=None if input_shape is None else list(input_shape),
        standardize=None if standardization is None else standardization.to_dict(),
    )
    writers: dict[str, Callable[[Path], object]] = {
        "model.safetensors": functools.partial(_write_tensors, tensors)
    }
    if sparse:
        writers["sparse.safetensors"] = functools.partial(write_sparse, tensors)
    units = units_as_dicts(small) if units is None else units
    if units is not None:
        units_from_dicts(units)  # raises if `load` could not read them
        writers[UNITS] = functools.partial(_write_text, json.dumps(units) + "\n")
    if original.config is not None:
        text = json.dumps(original.config, indent=2) + "\n"
        writers[CONFIG] = functools.partial(_write_text, text)
    files = NetworkFiles(description, writers)
    files.index({})  # raises if JSON cannot represent the arguments of the constructor
    return files


@dataclass(frozen=True)
class _Original:
    """The network that the constructor builds.

    Attributes:
        constructor: the name of the constructor.
        kwargs: its arguments, without the configuration.
        config: the configuration of a model of transformers, else None.
        net: the network, with separate attention if `separate_attention` is set.
    """

    constructor: str
    kwargs: Mapping[str, Any]
    config: dict[str, Any] | None
    net: nn.Module
    separate_attention: bool


def _original(
    small: nn.Module,
    constructor: Callable[..., nn.Module] | str,
    kwargs: Mapping[str, Any] | None,
) -> _Original:
    """Build the network from which `small` was pruned."""
    name = constructor if isinstance(constructor, str) else name_of(constructor)
    build = resolve(name) if isinstance(constructor, str) else constructor
    kwargs, config = dict(kwargs or {}), None
    if takes_config(build):
        config, more = config_of(small)
        kwargs = {**more, **kwargs}
        config = with_sizes_of(small, build, config, kwargs)
        build = functools.partial(build_from_config, build, config)
    net = build(**kwargs)
    separate = has_attention(net) and any(isinstance(m, Attention) for m in small.modules())
    if separate:
        net = separate_attention(net)
    settle_lazy_layers(net, small.state_dict())
    return _Original(name, kwargs, config, net, separate)


def _described(
    small: nn.Module, original: _Original
) -> tuple[Description, dict[str, torch.Tensor]]:
    """The difference of a network from the original, and its tensors.

    The original is cut and checked as in `load`, while the network is still in memory.

    Raises:
        ValueError: the constructor does not build this network, or it has values that the files
            cannot store.
    """
    name, net = original.constructor, original.net
    layers = resized_layers(small, net, name)
    tensors, same = unique_tensors(small)
    parameters = small.named_parameters(remove_duplicate=False)
    description = Description(
        constructor=name,
        kwargs=original.kwargs,
        separate_attention=original.separate_attention,
        layers=layers,
        sizes=smaller_sizes(small, net, layers),
        same=same,
        frozen=[parameter for parameter, value in parameters if not value.requires_grad],
    )
    try:
        shapes = resize_layers(net, description, under_all_names(tensors, same))
        buffers = changed_buffers(small, net)
        tensors.update(buffers)
        description = dataclasses.replace(description, buffers=list(buffers))
        check_fit(net, description, under_all_names(tensors, same), shapes)
    except ValueError as error:
        raise ValueError(f"{name} does not build this network: {error}") from error
    return description, tensors


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, METADATA)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"safetensors cannot store this network: {first_line(error)}") from error
