"""Multiply-accumulates (MACs) and parameters of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_sbp.gates.folding import call, evaluating
from pyro_sbp.gates.layers import Select

__all__ = ["costs_by_layer", "count_macs", "count_parameters", "original_name"]


def count_macs(net: nn.Module, example_input: Any) -> int:
    """Multiply-accumulates of the convolutions and matrix products in one call, without biases."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), evaluating(net), counter:
        call(net, example_input)
    return counter.get_total_flops() // 2


def count_parameters(net: nn.Module) -> int:
    """How many numbers the network's parameters hold."""
    return sum(parameter.numel() for parameter in net.parameters())


def costs_by_layer(net: nn.Module, example_input: Any) -> dict[str, tuple[int, int]]:
    """MACs in one call and parameters of every layer that has weights of its own.

    Returns:
        From a layer's name to its MACs and its parameters, in the order of the network. What is
        counted outside of these layers, such as the products inside attention, has the name "".
        A parameter that two layers share counts for the first.
    """
    layers = [n for n, m in net.named_modules() if n and any(True for _ in m.parameters(False))]
    # The first input's selection of a pruned layer wraps it: it is still the layer of that name.
    names = {layer: original_name(net, layer) for layer in layers}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), evaluating(net), counter:
        call(net, example_input)
    counts, top = counter.get_flop_counts(), type(net).__name__
    seen: set[int] = set()
    costs: dict[str, tuple[int, int]] = {}
    for layer, name in names.items():
        new = [p for p in net.get_submodule(layer).parameters(False) if id(p) not in seen]
        seen.update(map(id, new))
        macs = sum(counts.get(f"{top}.{layer}", {}).values()) // 2
        costs[name] = macs, sum(p.numel() for p in new)
    macs = sum(counts["Global"].values()) // 2 - sum(macs for macs, _ in costs.values())
    rest = macs, count_parameters(net) - sum(parameters for _, parameters in costs.values())
    return costs if rest == (0, 0) else {**costs, "": rest}


def original_name(net: nn.Module, layer: str) -> str:
    """What a layer was called before a cut put a `Select` before it: ``fc1`` for ``fc1.layer``."""
    parent, _, leaf = layer.rpartition(".")
    selects = isinstance(getattr(net.get_submodule(parent), "select", None), Select)
    return parent if leaf == "layer" and selects else layer
