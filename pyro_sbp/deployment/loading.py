"""Load saved networks without pickle and without Pyro."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pyro_sbp.deployment import file_sets
from pyro_sbp.deployment.configurations import CONFIG, build_from_config, parse_config, takes_config
from pyro_sbp.deployment.constructors import name_of, trusted
from pyro_sbp.deployment.description import INDEX, Description, UnknownFormat
from pyro_sbp.deployment.kept_units import UNITS, read_units
from pyro_sbp.deployment.rebuilding import (
    check_fit,
    construct,
    fill,
    resize_layers,
    settle_lazy_layers,
)
from pyro_sbp.deployment.shared_tensors import under_all_names
from pyro_sbp.deployment.sparse_files import read_sparse
from pyro_sbp.errors import damage, first_line
from pyro_sbp.gates.units import Units, set_units

__all__ = ["load"]


def load(
    directory: str | os.PathLike[str], constructor: Callable[..., nn.Module] | None = None
) -> nn.Module:
    """Load a network that `save` wrote, in evaluation mode, on the CPU.

    Every file is compared with its checksum, except in directories of earlier versions, which have
    no checksums. Types, sizes and indices must agree with the constructor and with each other. To
    load a ``network.json`` that you have edited, remove "checksums" from it.

    If the directory has a ``units.json``, its units become the attribute `units` of the network, as
    after `prune`. An attribute of this name that the constructor sets is not replaced.

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
    description, stored = _read(path)
    constructor = constructor or _trusted(path, description)
    build = constructor
    if takes_config(constructor):
        build = functools.partial(build_from_config, constructor, _read_config(path, description))
    try:
        net = _rebuilt(build, description, stored.state)
    except Exception as error:  # a constructor may raise anything if its arguments are damaged
        name, given = description.constructor, name_of(constructor)
        saved = "does not" if given == name else f"was saved from {name} and does not"
        raise ValueError(f"{path} {saved} fit {given}: {first_line(error)}") from error
    if stored.units is not None and not hasattr(net, "units"):
        set_units(net, stored.units)
    return net.eval()


@dataclass(frozen=True)
class _Stored:
    """What the files other than the index contain.

    Attributes:
        state: the tensors, each under all of its names.
        units: by gate, the units; None if they were not saved.
    """

    state: dict[str, torch.Tensor]
    units: dict[str, Units] | None


def _read(path: Path) -> tuple[Description, _Stored]:
    """Read the index and the other files of a directory.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        description = Description.read(path / INDEX)
        try:
            stored = _read_files(path, description)
        except (OSError, ValueError):
            # Another process may have replaced the files after the index was read.
            before, description = description, Description.read(path / INDEX)
            if description == before:
                raise
            stored = _read_files(path, description)
    except UnknownFormat as error:
        raise ValueError(f"{path} has {error}") from error
    except (OSError, ValueError) as error:
        if (path / "pruned" / INDEX).exists():
            raise ValueError(
                f"{path} is a run directory; its network is in {path / 'pruned'}"
            ) from error
        raise ValueError(f"{path} has no complete saved network: {first_line(error)}") from error
    return description, stored


def _read_files(path: Path, description: Description) -> _Stored:
    """Read the tensors and the units, after comparing all files with their checksums."""
    sums: Mapping[str, str | None] | None = description.checksums
    if sums is None:
        sums = dict.fromkeys(("model.safetensors", "sparse.safetensors", UNITS))
    files = {name: file_sets.locate(path, name, expected) for name, expected in sums.items()}
    whole, sparse = files.get("model.safetensors"), files.get("sparse.safetensors")
    file = whole or sparse
    if file is None:
        raise ValueError("model.safetensors is missing")
    tensors = read_sparse(file) if file is sparse else _read_whole(file)
    units = files.get(UNITS)
    return _Stored(
        state=under_all_names(tensors, description.same),
        units=None if units is None else read_units(units),
    )


def _read_whole(file: Path) -> dict[str, torch.Tensor]:
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


def _trusted(path: Path, description: Description) -> Callable[..., nn.Module]:
    """The constructor that the description names.

    Raises:
        ValueError: it cannot be imported, or it is not trusted and must be passed to `load`.
    """
    name = description.constructor
    try:
        constructor = trusted(name, description.kwargs)
    except ImportError as error:
        raise ValueError(
            f"{path} was built by {name}, which cannot be imported: {first_line(error)}"
        ) from error
    if constructor is None:
        raise ValueError(f"{path} was built by {name}: pass it as load(..., constructor=...)")
    return constructor


def _rebuilt(
    build: Callable[..., nn.Module], description: Description, state: dict[str, torch.Tensor]
) -> nn.Module:
    """Build the original network, cut its layers to the stored sizes, and fill in the tensors."""
    net = construct(build, description.kwargs, description.separate_attention)
    settle_lazy_layers(net, state)
    shapes = resize_layers(net, description, state)
    check_fit(net, description, state, shapes)
    fill(net, description, state)
    return net
