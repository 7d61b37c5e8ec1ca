"""Keep a pruned network in files that load without pickle, and without Pyro."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
import warnings
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
from pyro_sbp.errors import RequestError, damage, first_line
from pyro_sbp.gates.attention import Attention, has_attention, separate_attention
from pyro_sbp.gates.layers import SIZE_ATTRIBUTES, Select
from pyro_sbp.gates.sizes import Written, all_sizes, follows, ratios_around
from pyro_sbp.gates.units import units_of

__all__ = ["load", "load_weights", "save", "unique_tensors"]


#: The metadata of ``model.safetensors``, which transformers expects.
METADATA = {"format": "pt"}
#: What a saved network may consist of.
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

    ``model.safetensors`` holds the tensors. ``network.json`` holds the constructor, what differs
    from what it builds, which parameters are frozen, and a SHA-256 checksum of every file.
    ``units.json`` holds the units if they are given or `prune` has set them on the network.

    For a model of Hugging Face transformers, ``config.json`` holds its own configuration. If every
    layer has kept as many units, the configuration has the new numbers, and transformers can load
    the directory without pyro-sbp.

    A new directory appears only when all of its files are complete. With `overwrite`, the old
    network can be loaded until the new one is complete, and the new one from then on, even if the
    process is killed in between. An interrupted call may leave files whose names end in ``.part``.
    Those in the directory may be in use; the next `save` to it renames or replaces them. A
    directory ``NAME.*.part`` next to a new one is never in use once its process has ended, and can
    be deleted; `save` does not delete it, as it may belong to a process on another machine.

    What is kept are tensors: parameters and buffers with their values and types, which of them are
    the same tensor, and which parameters are frozen; and integer attributes of modules (or tuples
    of them) that have become smaller in the same ratio as a layer inside, such as a number of
    heads. Other attributes that were set after construction are not kept, such as the probability
    of a dropout layer, and neither are hooks, gradients or memory formats.

    Args:
        small: the network, from `prune` or `shrink`.
        directory: where to write; it must not exist or be empty.
        constructor: what built the original network, a callable or its name ``module:callable``.
            For a model of transformers, its class, as in ``type(model)``.
        kwargs: the constructor's arguments, plain values, besides the configuration.
        units: what is left of every gate: its total, and the kept and zeroed indices. By default
            the attribute `units` that `prune` has set on the network.
        input_shape: the shape of one example, for those who load the network.
        overwrite: replace a saved network in the directory.
        standardization: how images in [0, 1] are standardised before the network, for those who
            load it.
        sparse: write also ``sparse.safetensors``, which leaves out zeros. Either file is enough to
            load the network.
        beside: names of other files that may be in the directory, and stay as they are.

    Raises:
        FileExistsError: the directory exists and is not empty, or holds more than a saved network.
        ValueError: the constructor builds a network of other layers, or files cannot hold the
            network.
        OSError: a file cannot be written.
    """
    path = Path(directory)
    there = {file.name for file in path.iterdir()} if path.exists() else set()
    there -= {part(path / name).name for name in FILES} | {*beside}
    if there and not (overwrite and there <= set(FILES)):
        hint = "it holds other files" if overwrite else "give another, or overwrite=True"
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
    # Whatever `load` would refuse is refused here, while the network is still in memory.
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
    kept = units_of(small)
    if units is None and kept is not None:
        units = {gate: unit.to_dict() for gate, unit in kept.items()}
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
    # A unique name, as another process may be saving a network of the same name.
    unique = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part"))
    partial = unique / path.name
    try:
        partial.mkdir()  # unlike the directory around it, with the permissions of a new directory
        file_sets.replace(partial, writers, INDEX, describe)
        os.replace(partial, path)
    finally:
        shutil.rmtree(unique, ignore_errors=True)
    file_sets.sync(path.parent)


def _complete(path: Path) -> None:
    """Complete what a `save` to this directory that was killed had left to do."""
    if any(part(path / name).exists() for name in FILES):
        with contextlib.suppress(ValueError):  # a damaged network is replaced as well
            file_sets.complete(path, Description.read(path / INDEX).checksums or {})


def _resized_layers(small: nn.Module, fresh: nn.Module, name: str) -> dict[str, dict[str, int]]:
    """The sizes in which the layers of a network differ from those that a constructor builds.

    Raises:
        ValueError: the layers are others.
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
            # A module may have a method of this name, as models of transformers do.
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
    """The sizes written into modules that have become smaller with the layers inside."""
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
    """Buffers outside the state dict that are not as the constructor makes them."""
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
        raise ValueError(f"safetensors cannot hold this network: {first_line(error)}") from error


def unique_tensors(net: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A network's tensors as they are stored, and the first name of those that have two.

    Raises:
        ValueError: the state dict holds something that is not a tensor.
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

    Every file is compared with its checksum; in a directory of an earlier version, which has no
    checksums, types, sizes and indices have to fit the constructor and each other. To load a
    ``network.json`` that was edited on purpose, remove "checksums" from it.

    Args:
        directory: the directory of the network.
        constructor: what built the original network. Those of `pyro_sbp.networks`, torchvision,
            timm and transformers are found by their name; any other must be passed.

    Raises:
        ValueError: a file is missing or damaged, or the constructor is not among the trusted ones
            and was not passed.
    """
    path = Path(directory)
    try:
        description = Description.read(path / INDEX)
        try:
            tensors = _read_tensors(path, description)
        except (OSError, ValueError):
            # A `save` at the same time may have replaced the files since the index was read.
            before, description = description, Description.read(path / INDEX)
            if description == before:
                raise
            tensors = _read_tensors(path, description)
        state = _state(tensors, description)
    except UnknownFormat as error:
        raise ValueError(f"{path} has {error}") from error
    except (OSError, ValueError) as error:
        if (path / "pruned" / INDEX).exists():
            raise ValueError(f"{path} is a run; its network is in {path / 'pruned'}") from error
        raise ValueError(f"{path} holds no whole saved network: {first_line(error)}") from error
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
    """The stored tensors, after all files were compared with their checksums."""
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
        ValueError: it is missing or damaged.
    """
    try:
        file = file_sets.locate(path, CONFIG, (description.checksums or {}).get(CONFIG))
        if file is None:
            raise ValueError(f"{CONFIG} is missing")
        return parse_config(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no whole saved network: {damage(error)}") from error


def _state(
    tensors: Mapping[str, torch.Tensor], description: Description
) -> dict[str, torch.Tensor]:
    """Stored tensors, those that have two names under both."""
    for name, first in description.same.items():
        if first not in tensors or name in tensors:
            raise ValueError(f"{name!r} cannot be the same tensor as {first!r}")
    return {**tensors, **{name: tensors[first] for name, first in description.same.items()}}


def load_weights(net: nn.Module, path: Path, classes: int | None = None) -> None:
    """Load a state dict into a network, from a file of `torch.save` or safetensors.

    Args:
        net: the network, which is changed in place.
        path: the file.
        classes: the number of classes of the data. A layer with as many outputs, of which the file
            has another number, keeps its initial values, and a `UserWarning` says so. None refuses
            such a file.

    Raises:
        RequestError: the file cannot be read, holds no state dict, or one of another network, or
            its weights are not finite.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise RequestError(f"there is no file {path} to take weights from") from error
    except Exception as error:  # a file that is none may raise anything
        raise RequestError(
            f"{path} cannot be read as weights; expected safetensors, or a state dict of torch.save"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        if isinstance(state, Mapping) and "request" in state:
            raise RequestError(
                f"{path} is a checkpoint of a run; expected a state dict of the network"
            )
        raise RequestError(f"{path} holds no state dict, from parameter names to tensors")
    own = net.state_dict()
    for name, value in state.items():
        if name in own and own[name].is_floating_point() != value.is_floating_point():
            raise RequestError(f"{path} has {value.dtype} for {name!r}; expected {own[name].dtype}")
    layer = None if classes is None else _other_classes(state, own, classes)
    if layer is not None:
        for name in own:
            if name.rpartition(".")[0] == layer:
                state = {**state, name: own[name]}
    try:
        net.load_state_dict(state)
    except Exception as error:  # damaged metadata of a state dict may raise anything
        if (path.parent / "network.json").exists():
            raise RequestError(
                f"{path} has the weights of a pruned network; expected those of the whole one"
            ) from error
        raise RequestError(
            f"{path} has the weights of another network: "
            f"{_differences(state, own) or first_line(error)}"
        ) from error
    if layer is not None:
        warnings.warn(
            f"{path} has a layer {layer!r} of another number of classes than {classes}, so that "
            "layer keeps its initial values",
            stacklevel=2,
        )
    # A buffer may be infinite on purpose, such as a mask.
    wrong = [name for name, value in net.named_parameters() if not bool(value.isfinite().all())]
    wrong += [name for name, value in net.named_buffers() if bool(value.isnan().any())]
    if wrong:
        raise RequestError(f"{path} has values that are not finite, in {wrong[0]!r}")


def _other_classes(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], classes: int
) -> str | None:
    """The one layer that has an output for each class, where a file has other outputs; or None."""
    others = [name for name in own if name in state and state[name].shape != own[name].shape]
    layers = {name.rpartition(".")[0] for name in others}
    fits = all(
        state[name].ndim == own[name].ndim > 0
        and len(own[name]) == classes
        and state[name].shape[1:] == own[name].shape[1:]
        for name in others
    )
    return layers.pop() if fits and len(layers) == 1 else None


def _differences(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """In which tensors a state dict differs from that of a network, in one line; "" for none."""
    parts = []
    missing = [name for name in own if name not in state]
    others = [name for name in state if name not in own]
    shapes = [n for n in own if n in state and state[n].shape != own[n].shape]
    if shapes:
        name = shapes[0]
        parts.append(
            f"{name!r} is {list(state[name].shape)}, not {list(own[name].shape)}{_more(shapes)}"
        )
    if missing:
        parts.append(f"{missing[0]!r}{_more(missing)} is missing")
    if others:
        parts.append(f"{others[0]!r}{_more(others)} belongs to no layer")
    return "; ".join(parts)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
