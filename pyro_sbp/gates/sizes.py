"""Attributes of modules that store numbers of units, such as `num_heads`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import torch
from torch import nn

from pyro_sbp.gates.gate import Gate, Size

__all__ = [
    "Written",
    "all_sizes",
    "combined",
    "fitting_sizes",
    "follows",
    "likely_sizes",
    "ratios_around",
    "set_size",
    "set_sizes",
    "written_sizes",
]

#: The value of an attribute with sizes.
Written = int | tuple[int, ...] | list[int]

#: The attribute in which the modules of transformers store their configuration.
_CONFIG = "config"
#: Parts of the names of attributes that store the number of heads, or of the features of all heads.
_OF_HEADS = ("heads", "attn_dim", "head_size", "inner_dim")


def written_sizes(module: nn.Module) -> dict[str, Written]:
    """The attributes of a module that may be sizes: integers, and tuples and lists of integers.

    The attributes of the modules of torch are not included, because `resize` sets them.
    """
    if type(module).__module__.startswith("torch."):
        return {}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_written(value)
    }


def _config_sizes(module: nn.Module) -> dict[str, Written]:
    """The integers in the configuration of a module, by names such as ``config.num_heads``."""
    config = vars(module).get(_CONFIG)
    if type(module).__module__.startswith("torch.") or isinstance(config, type | nn.Module):
        return {}
    return {
        f"{_CONFIG}.{name}": value
        for name, value in getattr(config, "__dict__", {}).items()
        if not name.startswith("_") and type(value) is int
    }


def all_sizes(module: nn.Module) -> dict[str, Written]:
    """The attributes of a module and of its configuration that may be sizes."""
    return {**written_sizes(module), **_config_sizes(module)}


def set_size(module: nn.Module, attribute: str, value: Written) -> None:
    """Set an attribute from `all_sizes`, in place.

    A configuration is copied first, because other modules share it.
    """
    holder, _, name = attribute.rpartition(".")
    if holder:
        config = copy.copy(vars(module)[holder])
        setattr(config, name, value)
        setattr(module, holder, config)
    else:
        setattr(module, name, value)


def _is_written(value: Any) -> bool:
    if type(value) in (tuple, list):
        return len(value) > 0 and all(type(item) is int for item in value)
    return type(value) is int


def fitting_sizes(net: nn.Module, gate: Gate, configs: bool = False) -> list[tuple[Size, ...]]:
    """The attributes of modules around the layers of a gate that may depend on its units.

    Args:
        net: the network.
        gate: the gate.
        configs: whether to include the integers in the configurations of modules.

    Returns:
        For each attribute, the possible sizes in it. A possible size is the number of units, or a
        multiple of it that divides the number of rows or columns of a layer of the gate.
    """
    counts = _per_unit(gate)
    found = []
    for name in _around(gate):
        module = net.get_submodule(name)
        written = all_sizes(module) if configs else written_sizes(module)
        for attribute, value in written.items():
            items = enumerate(value) if not isinstance(value, int) else [(None, value)]
            sizes = tuple(
                Size(name, attribute, place, item // gate.size)
                for place, item in items
                if item > 0
                and item % gate.size == 0
                and any(count % (item // gate.size) == 0 for count in counts)
            )
            if sizes:
                found.append(sizes)
    return found


def likely_sizes(net: nn.Module, gate: Gate, configs: bool = False) -> tuple[Size, ...]:
    """The possible sizes whose names suggest the number of heads, or of the rows of all heads.

    Args:
        net, gate, configs: as for `fitting_sizes`.
    """
    counts = _per_unit(gate)
    return tuple(
        size
        for sizes in fitting_sizes(net, gate, configs)
        for size in sizes
        if any(part in size.attribute for part in _OF_HEADS)
        and ("heads" in size.attribute or size.per_unit in counts)
    )


def combined(sizes: Sequence[tuple[Size, ...]], most: int) -> Iterator[tuple[Size, ...]]:
    """The combinations of at most `most` attributes, those with fewer attributes first.

    Args:
        sizes: for each attribute, its possible sizes, from `fitting_sizes`.
        most: the largest number of attributes.

    Yields:
        All sizes of the attributes in a combination. The first combination is empty.
    """
    for number in range(min(most, len(sizes)) + 1):
        for chosen in combinations(sizes, number):
            yield tuple(size for of_attribute in chosen for size in of_attribute)


def set_sizes(net: nn.Module, gate: Gate, count: int) -> None:
    """Set the attributes in `gate.sizes` for the number of units that remain, in place.

    Args:
        net: the network.
        gate: the gate.
        count: the number of units that remain.
    """
    for size in gate.sizes:
        module = net.get_submodule(size.module)
        value = count * size.per_unit
        if size.place is not None:
            items = list(getattr(module, size.attribute))
            items[size.place] = value
            setattr(module, size.attribute, type(getattr(module, size.attribute))(items))
        else:
            set_size(module, size.attribute, value)


def ratios_around(
    net: nn.Module, layers: Mapping[str, Mapping[str, int]]
) -> dict[str, set[Fraction]]:
    """The ratios by which layers were cut, for each module that contains them.

    Args:
        net: the network before the cut.
        layers: from the name of a layer to the new values of its attributes that store sizes.

    Returns:
        From the name of a module to the ratios of the layers in it: the new size divided by the old
        one.
    """
    ratios: dict[str, set[Fraction]] = {}
    for layer, sizes in layers.items():
        module = net.get_submodule(layer)
        olds = [(new, getattr(module, name, None)) for name, new in sizes.items()]
        here = {Fraction(new, old) for new, old in olds if type(old) is int and 0 < new < old}
        while layer:
            layer = layer.rpartition(".")[0]
            ratios.setdefault(layer, set()).update(here)
    return ratios


def follows(new: Any, old: Written, ratios: Iterable[Fraction]) -> bool:
    """Whether each size is unchanged, or was multiplied by the ratio of some layer.

    Args:
        new: the value of an attribute after a cut.
        old: its value before the cut.
        ratios: the ratios of the layers in the module, from `ratios_around`.
    """
    if isinstance(old, int):
        return type(new) is int and (new == old or any(new == old * ratio for ratio in ratios))
    return (
        type(new) in (tuple, list)
        and len(new) == len(old)
        and all(follows(a, b, ratios) for a, b in zip(new, old, strict=True))
    )


def _per_unit(gate: Gate) -> set[int]:
    """The number of rows or columns per unit, in layers where it is the same for all units."""
    counts = set()
    for span in (*gate.writers, *gate.readers):
        number = torch.bincount(span.units[span.units >= 0], minlength=gate.size)
        if bool((number == number[0]).all()):
            counts.add(int(number[0]))
    return counts


def _around(gate: Gate) -> list[str]:
    """The modules that contain layers of a gate, up to the innermost one that contains all."""
    parents = [
        # A module with a weight as parameter may also store sizes.
        span.layer.split(".")[: None if span.tensor else -1]
        for span in (*gate.writers, *gate.readers)
    ]
    common = 0
    while all(len(p) > common and p[common] == parents[0][common] for p in parents):
        common += 1
    return list(
        dict.fromkeys(
            ".".join(parent[:depth])
            for parent in parents
            for depth in range(len(parent), common - 1, -1)
        )
    )
