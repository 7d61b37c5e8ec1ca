"""Prune networks with Torch-Pruning to a number of MACs, for `pyro_sbp.experiments.baselines`.

The package is an extra: ``pip install 'pyro-sbp[experiments]'``.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_sbp.pruning.macs import count_macs

__all__ = ["IMPORTANCES", "prune_to", "widths"]


Score = Callable[[Any], Tensor]


def _magnitude() -> Score:
    import torch_pruning as tp

    return tp.importance.MagnitudeImportance(p=1, group_reduction="first")


def _taylor() -> Score:
    import torch_pruning as tp

    return tp.importance.GroupTaylorImportance()


def _group_norm() -> Score:
    import torch_pruning as tp

    return tp.importance.GroupMagnitudeImportance(p=2)


def _random() -> Score:
    import torch_pruning as tp

    return tp.importance.RandomImportance()


#: The importance of a unit. Magnitude: the sum of the absolute values of its weights. Group-norm:
#: the mean of the squared norms of its weights, of the weights that read it, and of its gain in
#: batch norm. Taylor: the same for weights times gradients, which is the first-order change of the
#: loss. Random: a random number.
IMPORTANCES: dict[str, Callable[[], Score]] = {
    "magnitude": _magnitude,
    "taylor": _taylor,
    "group-norm": _group_norm,
    "random": _random,
}


def widths(net: nn.Module) -> dict[str, int]:
    """The number of units of every dense layer and convolution, in order of registration."""
    return {
        name: layer.weight.shape[0]
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def prune_to(
    net: nn.Module,
    macs: float,
    example: Tensor,
    importance: Score,
    ignore: Sequence[str],
    seed: int,
) -> nn.Module:
    """Prune a copy of a network with Torch-Pruning to at most `macs`, with as few units removed as
    possible.

    Args:
        net: the network; its gradients are used for the importance.
        macs: multiply-accumulates of one example.
        example: a batch of inputs.
        importance: from a group of the library to scores ``[units]``.
        ignore: the layers whose units are all kept.
        seed: the seed of random importance.

    Raises:
        ValueError: the network with one unit per layer has more MACs.
    """
    import torch_pruning as tp

    def spared(group: Any) -> Tensor:
        scores = importance(group)
        scores[scores.argmax()] = float("inf")
        return scores

    free = [n for name, n in widths(net).items() if name not in ignore and n > 1]

    def without(count: int) -> nn.Module:
        small = copy.deepcopy(net)
        for new, old in zip(small.parameters(), net.parameters(), strict=True):
            new.grad = None if old.grad is None else old.grad.clone()
        # Half a unit less, so that rounding errors in the share do not change the number of units.
        share = (count - 0.5) / max(1, sum(free))
        ignored = [small.get_submodule(name) for name in ignore]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tp.pruner.BasePruner(
                small,
                example,
                importance=spared,
                global_pruning=True,
                pruning_ratio=share,
                ignored_layers=ignored,
            ).step()
        small.zero_grad()
        return small

    counts = range(sum(free) - len(free) + 1)
    index = bisect_left(counts, True, key=lambda n: count_macs(without(n), example[:1]) <= macs)
    if index == len(counts):
        least = count_macs(without(counts[-1]), example[:1])
        raise ValueError(f"{macs:.0f} MACs are not possible: one unit per layer has {least}")
    return without(counts[index])
