"""Keep a pruned network in files that load without pickle, and without Pyro."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pyro_sbp import networks
from pyro_sbp.datasets.standardization import Standardization
from pyro_sbp.deployment.sparse_files import read_sparse, write_sparse
from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.gates.attention import Attention, has_attention, separate_attention
from pyro_sbp.gates.layers import SIZE_ATTRIBUTES, Select

__all__ = ["load", "load_weights", "save", "unique_tensors"]


#: What a saved network may consist of.
FILES = ("model.safetensors", "sparse.safetensors", "network.json", "units.json")


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
    """Write a pruned network to a directory, which appears whole or not at all.

    ``model.safetensors`` holds the tensors, ``network.json`` the constructor and what differs from
    what it builds, ``units.json`` the units if they are given.

    Args:
        small: the network, from `prune` or `shrink`.
        directory: where to write; it must not exist or be empty.
        constructor: what built the original network, a callable or its name ``module:callable``.
        kwargs: the constructor's arguments, plain values.
        units: of every gate, what is left: its total and the kept and zeroed indices.
        input_shape: the shape of one example, for those who load the network.
        overwrite: a saved network in the directory gives way.
        standardization: what images in [0, 1] go through before the network, for those who load it.
        sparse: write also ``sparse.safetensors``, which leaves out zeros; either file is enough.

    Raises:
        FileExistsError: the directory is there and not empty, or holds more than a saved network.
        ValueError: the constructor builds a network of other layers.
    """
    path = Path(directory)
    there = {file.name for file in path.iterdir()} if path.exists() else set()
    if there and not (overwrite and there <= set(FILES)):
        hint = "it holds other files" if overwrite else "give another, or overwrite=True"
        raise FileExistsError(f"{path} is not empty: {hint}")
    name = constructor if isinstance(constructor, str) else _name(constructor)
    build = _resolve(name) if isinstance(constructor, str) else constructor
    layers = {}
    fresh = build(**(kwargs or {}))
    separate = has_attention(fresh) and any(isinstance(m, Attention) for m in small.modules())
    if separate:
        fresh = separate_attention(fresh)
    here = dict(small.named_modules())
    for layer, module in fresh.named_modules():
        change: dict[str, Any] = {}
        found = here.get(layer)
        if isinstance(found, nn.Sequential) and isinstance(getattr(found, "select", None), Select):
            change["select"] = len(found.select.index)
            found = found.layer
        if type(found) is not type(module):
            raise ValueError(f"{name} builds a {type(module).__name__} at {layer!r}, not {found}")
        for attribute in SIZE_ATTRIBUTES:
            if getattr(found, attribute, None) != getattr(module, attribute, None):
                change[attribute] = getattr(found, attribute)
        if change:
            layers[layer] = change
    tensors, same = unique_tensors(small)
    network = {
        "format": 1,
        "constructor": name,
        "kwargs": dict(kwargs or {}),
        "input_shape": None if input_shape is None else list(input_shape),
        "separate_attention": separate,
        "layers": layers,
        "same": same,
    }
    if standardization is not None:
        network["standardize"] = standardization.to_dict()
    partial = path.with_name(path.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / "model.safetensors")
        if sparse:
            write_sparse(tensors, partial / "sparse.safetensors")
        text = json.dumps(network, indent=2) + "\n"
        (partial / "network.json").write_text(text, encoding="utf-8")
        if units is not None:
            (partial / "units.json").write_text(json.dumps(units) + "\n", encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unique_tensors(net: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A network's tensors as they are stored, and the first name of those that have two."""
    tensors: dict[str, torch.Tensor] = {}
    same: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in net.state_dict().items():
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

    Args:
        directory: where it lies.
        constructor: what built the original network. Those of `pyro_sbp.networks` and
            `torchvision.models` are found by their name; any other must be passed.

    Raises:
        ValueError: a file is missing or damaged, or the constructor is not among the trusted ones
            and was not passed.
    """
    path = Path(directory)
    try:
        network = json.loads((path / "network.json").read_text(encoding="utf-8"))
        whole = path / "model.safetensors"
        sparse = path / "sparse.safetensors"
        state = load_file(whole) if whole.exists() or not sparse.exists() else read_sparse(sparse)
        name, kwargs, layers = network["constructor"], network["kwargs"], network["layers"]
        version = network["format"]
        state.update({name: state[first] for name, first in network.get("same", {}).items()})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if (path / "pruned" / "network.json").exists():
            raise ValueError(f"{path} is a run; its network is in {path / 'pruned'}") from error
        raise ValueError(f"{path} holds no whole saved network: {error}") from error
    if version != 1:
        raise ValueError(f"{path} has format {version}; this version of pyro-sbp reads format 1")
    if constructor is None:
        constructor = _trusted(name, kwargs)
        if constructor is None:
            raise ValueError(f"{path} was built by {name}: pass it as load(..., constructor=...)")
    try:
        net = constructor(**kwargs)
        if network.get("separate_attention"):
            net = separate_attention(net)
        for layer, change in layers.items():
            _apply(net, layer, change)
        _reshape(net, state)
        net.load_state_dict(state)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit {name}: {first_line(error)}") from error
    return net.eval()


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a state dict into a network, from a file of `torch.save` or safetensors.

    Raises:
        RequestError: the file cannot be read, holds no state dict, or one of another network.
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
        isinstance(v, torch.Tensor) for v in state.values()
    ):
        if isinstance(state, Mapping) and "module" in state:
            raise RequestError(
                f"{path} is a checkpoint of a run; expected a state dict of the network"
            )
        raise RequestError(f"{path} holds no state dict, from parameter names to tensors")
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        if (path.parent / "network.json").exists():
            raise RequestError(
                f"{path} has the weights of a pruned network; expected those of the whole one"
            ) from error
        lines = str(error).splitlines()
        raise RequestError(
            f"{path} has the weights of another network: {lines[min(1, len(lines) - 1)].strip()}"
        ) from error


def _name(constructor: Callable[..., nn.Module]) -> str:
    return f"{constructor.__module__}:{constructor.__qualname__}"


def _resolve(name: str) -> Callable[..., nn.Module]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _trusted(name: str, kwargs: Mapping[str, Any]) -> Callable[..., nn.Module] | None:
    """A network of pyro_sbp or torchvision; None for any other, as a file must not name code."""
    module, _, attribute = name.partition(":")
    if module == "pyro_sbp.networks":
        return getattr(networks, attribute) if attribute in networks.__all__ else None
    downloads = {"weights", "weights_backbone"} & set(kwargs)
    if module.startswith("torchvision.models") and not downloads:
        from torchvision.models import get_model_builder, list_models

        if attribute in list_models():
            return get_model_builder(attribute)
    return None


def _apply(net: nn.Module, layer: str, change: Mapping[str, Any]) -> None:
    module = net.get_submodule(layer)
    for attribute, value in change.items():
        if not isinstance(value, int):
            raise ValueError(f"{attribute} of layer {layer!r} is {value!r}, not an integer")
        if attribute == "select":
            select = Select(torch.zeros(value, dtype=torch.int64))
            parent, _, leaf = layer.rpartition(".")
            wrapped = nn.Sequential(OrderedDict(select=select, layer=module))
            setattr(net.get_submodule(parent), leaf, wrapped)
        elif attribute in SIZE_ATTRIBUTES:
            setattr(module, attribute, value)
        else:
            raise ValueError(f"layer {layer!r} sets {attribute!r}, which no layer has")


def _reshape(net: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give parameters and buffers the shapes of the tensors that they will hold."""
    for name, tensor in state.items():
        parent, _, leaf = name.rpartition(".")
        module = net.get_submodule(parent)
        old = getattr(module, leaf)
        if old.shape != tensor.shape or old.dtype != tensor.dtype:
            new = torch.empty_like(tensor)
            setattr(module, leaf, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
