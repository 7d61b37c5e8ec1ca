"""How a pruned network differs from the network that its constructor builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pyro_sbp.deployment.rebuilding import non_persistent_buffers
from pyro_sbp.gates.layers import SIZE_ATTRIBUTES, Select
from pyro_sbp.gates.sizes import Written, all_sizes, follows, ratios_around

__all__ = ["changed_buffers", "resized_layers", "smaller_sizes"]


def resized_layers(small: nn.Module, fresh: nn.Module, name: str) -> dict[str, dict[str, int]]:
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


def smaller_sizes(
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


def changed_buffers(small: nn.Module, fresh: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers outside the state dict that differ from those of the constructor."""
    made = non_persistent_buffers(fresh)
    return {
        name: buffer.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, buffer in non_persistent_buffers(small).items()
        if name in made
        and not (buffer.dtype == made[name].dtype and torch.equal(buffer.cpu(), made[name].cpu()))
    }
