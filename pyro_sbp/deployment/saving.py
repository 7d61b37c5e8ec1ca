"""Save pruned networks to files, and load them without pickle and without Pyro."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pyro_sbp.datasets.standardization import Standardization
from pyro_sbp.deployment import file_sets
from pyro_sbp.deployment.configurations import (
    CONFIG,
    build_from_config,
    config_of,
    parse_config,
    takes_config,
    with_sizes_of,
)
from pyro_sbp.deployment.constructors import name_of, resolve, trusted
from pyro_sbp.deployment.description import INDEX, Description, UnknownFormat
from pyro_sbp.deployment.file_sets import part
from pyro_sbp.deployment.rebuilding import (
    check_fit,
    construct,
    fill,
    non_persistent_buffers,
    resize_layers,
    settle_lazy_layers,
)
from pyro_sbp.deployment.sparse_files import read_sparse, write_sparse
from pyro_sbp.errors import damage, first_line
from pyro_sbp.gates.attention import Attention, has_attention, separate_attention
from pyro_sbp.gates.layers import SIZE_ATTRIBUTES, Select
from pyro_sbp.gates.noise import check_no_noise
from pyro_sbp.gates.sizes import Written, all_sizes, follows, ratios_around
from pyro_sbp.gates.units import units_as_dicts

__all__ = ["load", "save", "unique_tensors"]


#: The metadata of ``model.safetensors``, which transformers expects.
METADATA = {"format": "pt"}
#: The files of a saved network; some are optional.
FILES = ("model.safetensors", "sparse.safetensors", INDEX, CONFIG, "units.json")


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
    beside: Collection[str] = (),
) -> None:
    """Write a pruned network to a directory.

    ``model.safetensors`` contains the tensors. ``network.json`` contains the constructor, the
    differences from the network that it builds, the names of frozen parameters, and a SHA-256
    checksum of every file. ``units.json`` contains the units if they are given, or if `prune` has
    set them on the network.

    For a model of Hugging Face transformers, ``config.json`` contains its configuration. If every
    layer has kept the same number of units, the configuration has the new numbers, and transformers
    can load the directory without pyro-sbp.

    A new directory appears only when all of its files are complete. With `overwrite`, the old
    network can be loaded until the new one is complete, and then the new one, even if the process
    is killed in between. An interrupted call may leave files whose names end in ``.part``. Files
    with this ending in the directory may be in use. The next `save` to the directory renames or
    replaces them. A directory ``NAME.*.part`` next to the new directory can be deleted after its
    process has ended. `save` does not delete it, because the process may run on another machine.

    Saved are parameters and buffers with their values and types, which of them share a tensor, and
    which parameters are frozen. Integer attributes of modules, and tuples of integers, are saved if
    they have become smaller in the same ratio as a layer inside, such as a number of heads. Other
    attributes that were set after construction, such as the probability of a dropout layer, are not
    saved, and neither are hooks, gradients and memory formats.

    Args:
        small: the network, from `prune` or `shrink`.
        directory: the directory to write. Without `overwrite`, it must not exist, or must be empty.
        constructor: the function or class that builds the original network, or its name
            ``module:callable``. For a model of transformers it is the class, ``type(model)``.
        kwargs: the arguments of the constructor, plain values, without the configuration.
        units: by gate, the total number of units, and the indices of the kept and the zeroed units.
            The default is the attribute `units` that `prune` has set on the network.
        input_shape: the shape of one example. It is stored as information for users of the network.
        overwrite: whether to replace a saved network in the directory.
        standardization: the standardization of images in [0, 1] that the network expects. It is
            stored as information for users of the network.
        sparse: whether to write ``sparse.safetensors`` too, which stores no zeros. Either file is
            enough to load the network.
        beside: the names of other files that may be in the directory. They are not changed.

    Raises:
        FileExistsError: the directory is not empty, and `overwrite` is not set or the directory
            contains other files than a saved network.
        ValueError: the constructor builds a network with other layers, the network has values that
            the files cannot store, or the noise of a `Pruner` is attached to the network.
        OSError: a file cannot be written.
    """
    check_no_noise(small, "saved")
    path = Path(directory)
    there = {file.name for file in path.iterdir()} if path.exists() else set()
    there -= {part(path / name).name for name in FILES} | {*beside}
    if there and not (overwrite and there <= set(FILES)):
        hint = "it contains other files" if overwrite else "give another, or overwrite=True"
        raise FileExistsError(f"{path} is not empty: {hint}")
    name = constructor if isinstance(constructor, str) else name_of(constructor)
    build = resolve(name) if isinstance(constructor, str) else constructor
    config = None
    if takes_config(build):
        config, more = config_of(small)
        kwargs = {**more, **(kwargs or {})}
        config = with_sizes_of(small, build, config, kwargs)
        build = functools.partial(build_from_config, build, config)
    fresh = build(**(kwargs or {}))
    separate = has_attention(fresh) and any(isinstance(m, Attention) for m in small.modules())
    if separate:
        fresh = separate_attention(fresh)
    settle_lazy_layers(fresh, small.state_dict())
    layers = _resized_layers(small, fresh, name)
    tensors, same = unique_tensors(small)
    description = Description(
        constructor=name,
        kwargs=dict(kwargs or {}),
        input_shape=None if input_shape is None else list(input_shape),
        separate_attention=separate,
        layers=layers,
        sizes=_smaller_sizes(small, fresh, layers),
        same=same,
        standardize=None if standardization is None else standardization.to_dict(),
        frozen=[
            parameter
            for parameter, value in small.named_parameters(remove_duplicate=False)
            if not value.requires_grad
        ],
    )
    # Run the checks of `load` now, while the network is still in memory.
    try:
        shapes = resize_layers(fresh, description, _state(tensors, description))
        buffers = _changed_buffers(small, fresh)
        tensors.update(buffers)
        description = dataclasses.replace(description, buffers=list(buffers))
        check_fit(fresh, description, _state(tensors, description), shapes)
    except ValueError as error:
        raise ValueError(f"{name} does not build this network: {error}") from error
    writers: dict[str, Callable[[Path], object]] = {
        "model.safetensors": lambda file: _write_tensors(tensors, file)
    }
    if sparse:
        writers["sparse.safetensors"] = lambda file: write_sparse(tensors, file)
    units = units_as_dicts(small) if units is None else units
    texts: dict[str, Any] = {"units.json": units, CONFIG: config}
    for file_name, content in texts.items():
        if content is not None:
            text = json.dumps(content, indent=2 if file_name == CONFIG else None) + "\n"
            writers[file_name] = functools.partial(_write_text, text)

    def describe(checksums: Mapping[str, str]) -> str:
        return dataclasses.replace(description, checksums=checksums).to_json()

    describe({})  # raises before anything is written
    try:
        if path.exists():
            _complete(path)
            file_sets.replace(path, writers, INDEX, describe, set(FILES) - {*writers, INDEX})
        else:
            _write_new(path, writers, describe)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {first_line(error)}") from error


def _write_new(
    path: Path,
    writers: Mapping[str, Callable[[Path], object]],
    describe: Callable[[Mapping[str, str]], str],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A unique name, because another process may save a network with the same name.
    unique = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part"))
    partial = unique / path.name
    try:
        partial.mkdir()  # with the usual permissions, unlike the directory of mkdtemp
        file_sets.replace(partial, writers, INDEX, describe)
        os.replace(partial, path)
    finally:
        shutil.rmtree(unique, ignore_errors=True)
    file_sets.sync(path.parent)


def _complete(path: Path) -> None:
    """Complete an earlier `save` to this directory that was interrupted."""
    if any(part(path / name).exists() for name in FILES):
        with contextlib.suppress(ValueError):  # a damaged network can be replaced too
            file_sets.complete(path, Description.read(path / INDEX).checksums or {})


def _resized_layers(small: nn.Module, fresh: nn.Module, name: str) -> dict[str, dict[str, int]]:
    """By layer, the sizes that differ between a network and the one that its constructor builds.

    Raises:
        ValueError: the networks have different layers.
    """
    layers = {}
    here = dict(small.named_modules())
    for layer, module in fresh.named_modules():
        change: dict[str, Any] = {}
        found = here.pop(layer, None)
        select = getattr(found, "select", None)
        if isinstance(found, nn.Sequential) and isinstance(select, Select):
            change["select"] = len(select.get_buffer("index"))
            prefix = f"{layer}." if layer else ""
            del here[f"{prefix}select"]
            found = here.pop(f"{prefix}layer")
        if type(found) is not type(module):
            raise ValueError(f"{name} builds a {type(module).__name__} at {layer!r}, not {found}")
        for attribute in SIZE_ATTRIBUTES:
            size = getattr(found, attribute, None)
            # A module may have a method with this name, as in transformers.
            if isinstance(size, int) and size != getattr(module, attribute, None):
                change[attribute] = size
        if change:
            layers[layer] = change
    if here:
        layer, module = next(iter(here.items()))
        raise ValueError(f"{name} builds no {type(module).__name__} at {layer!r}")
    return layers


def _smaller_sizes(
    small: nn.Module, fresh: nn.Module, layers: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, Written]]:
    """By module, the attributes that have become smaller in the same ratio as a layer inside."""
    found = {}
    for module, ratios in ratios_around(fresh, layers).items():
        here = all_sizes(small.get_submodule(module))
        smaller = {
            name: here[name]
            for name, old in all_sizes(fresh.get_submodule(module)).items()
            if name in here and here[name] != old and follows(here[name], old, ratios)
        }
        if smaller:
            found[module] = smaller
    return found


def _changed_buffers(small: nn.Module, fresh: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers outside the state dict that differ from those of the constructor."""
    made = non_persistent_buffers(fresh)
    return {
        name: buffer.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, buffer in non_persistent_buffers(small).items()
        if name in made
        and not (buffer.dtype == made[name].dtype and torch.equal(buffer.cpu(), made[name].cpu()))
    }


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, METADATA)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"safetensors cannot store this network: {first_line(error)}") from error


def unique_tensors(net: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a network, each under its first name, and from each further name to the first
    name of the same tensor.

    Raises:
        ValueError: the state dict has a value that is not a dense tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    same: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in net.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{name!r} of the state dict is not a dense tensor")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            same[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.contiguous()
    return tensors, same


def load(
    directory: str | os.PathLike[str], constructor: Callable[..., nn.Module] | None = None
) -> nn.Module:
    """Load a network that `save` wrote, in evaluation mode, on the CPU.

    Every file is compared with its checksum. Directories of earlier versions have no checksums.
    Types, sizes and indices must then agree with the constructor and with each other. To load a
    ``network.json`` that you have edited, remove "checksums" from it.

    Args:
        directory: the directory of the network.
        constructor: the function or class that builds the original network. Those of
            `pyro_sbp.networks`, torchvision, timm and transformers are found by their name. Others
            must be given.

    Raises:
        ValueError: a file is missing or damaged, or the constructor is not found by its name and
            was not given.
    """
    path = Path(directory)
    try:
        description = Description.read(path / INDEX)
        try:
            tensors = _read_tensors(path, description)
        except (OSError, ValueError):
            # Another process may have replaced the files after the index was read.
            before, description = description, Description.read(path / INDEX)
            if description == before:
                raise
            tensors = _read_tensors(path, description)
        state = _state(tensors, description)
    except UnknownFormat as error:
        raise ValueError(f"{path} has {error}") from error
    except (OSError, ValueError) as error:
        if (path / "pruned" / INDEX).exists():
            raise ValueError(
                f"{path} is a run directory; its network is in {path / 'pruned'}"
            ) from error
        raise ValueError(f"{path} has no complete saved network: {first_line(error)}") from error
    name = description.constructor
    try:
        constructor = constructor or trusted(name, description.kwargs)
    except ImportError as error:
        raise ValueError(
            f"{path} was built by {name}, which cannot be imported: {first_line(error)}"
        ) from error
    if constructor is None:
        raise ValueError(f"{path} was built by {name}: pass it as load(..., constructor=...)")
    build = constructor
    if takes_config(constructor):
        build = functools.partial(build_from_config, constructor, _read_config(path, description))
    try:
        net = construct(build, description.kwargs, description.separate_attention)
        settle_lazy_layers(net, state)
        shapes = resize_layers(net, description, state)
        check_fit(net, description, state, shapes)
        fill(net, description, state)
    except Exception as error:  # a constructor may raise anything if its arguments are damaged
        given = name_of(constructor)
        saved = "does not" if given == name else f"was saved from {name} and does not"
        raise ValueError(f"{path} {saved} fit {given}: {first_line(error)}") from error
    return net.eval()


def _read_tensors(path: Path, description: Description) -> dict[str, torch.Tensor]:
    """Read the stored tensors, after comparing all files with their checksums."""
    sums: Mapping[str, str | None] | None = description.checksums
    if sums is None:
        sums = dict.fromkeys(("model.safetensors", "sparse.safetensors"))
    files = {name: file_sets.locate(path, name, expected) for name, expected in sums.items()}
    whole, sparse = files.get("model.safetensors"), files.get("sparse.safetensors")
    file = whole or sparse
    if file is None:
        raise ValueError("model.safetensors is missing")
    if file is sparse:
        return read_sparse(file)
    try:
        return load_file(file)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{file.name} is damaged: {damage(error)}") from error


def _read_config(path: Path, description: Description) -> dict[str, Any]:
    """The configuration of a model of transformers.

    Raises:
        ValueError: the configuration is missing or damaged.
    """
    try:
        file = file_sets.locate(path, CONFIG, (description.checksums or {}).get(CONFIG))
        if file is None:
            raise ValueError(f"{CONFIG} is missing")
        return parse_config(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} has no complete saved network: {damage(error)}") from error


def _state(
    tensors: Mapping[str, torch.Tensor], description: Description
) -> dict[str, torch.Tensor]:
    """The stored tensors. A tensor with two names is included under both."""
    for name, first in description.same.items():
        if first not in tensors or name in tensors:
            raise ValueError(f"{name!r} cannot be the same tensor as {first!r}")
    return {**tensors, **{name: tensors[first] for name, first in description.same.items()}}
