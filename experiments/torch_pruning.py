"""Torch-Pruning at what a run of ours cost: same network, data, seed, epochs and MACs.

    python -m pyro_sbp.experiments.baselines --importance taylor experiments/results/RECORD.json ...
    python -m pyro_sbp.experiments.baselines --arch lenet5 --importance magnitude --seed 1 10 20

A record is that of a run (of an image folder, made where the folder lies); a number is a MACs
ratio, to be had by the recipe that the network has by default or `--recipe` names. The dense epochs
are those of the recipe and end at the same network as the run's: initial weights and the order of
the data are the same, in float32. Then the network is trained for as many epochs as the run has
with noise and in fine-tuning together. On the way, over the first half of these, it is pruned in
steps, ten unless `--steps` says otherwise: iterative pruning is what the library offers for high
ratios. Every step takes the same share of the MACs. Learning rates are the recipe's, constant up to
the last step, and fall over the recipe's last share of what is left after it; each phase has an
Adam of its own. It is the recipe's `learning_rate` throughout, and the labels are those of the
data, without soft ones.

Units are ranked over all layers together (`global_pruning`), by importance divided by its mean in
the layer, as is the library's default. The best unit of every layer stays, and so does the layer of
the logits. Where our run gates the input pixels too, as of LeNet-500-300, the same MACs are had by
hidden units alone: Torch-Pruning has no notion of an input that is not read.
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


#: What a unit is judged by. Magnitude: the sum of its own weights' sizes. Group-norm: the mean of
#: the squared norms of its weights, those that read it, and its batch norm's gain. Taylor: the
#: same of weights times gradients, the first order of what the loss would lose. Random: a draw.
IMPORTANCES: dict[str, Callable[[], Score]] = {
    "magnitude": _magnitude,
    "taylor": _taylor,
    "group-norm": _group_norm,
    "random": _random,
}


def widths(net: nn.Module) -> dict[str, int]:
    """The units of every dense layer and convolution, in the order of their registration."""
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
    """A copy of a network, pruned by Torch-Pruning of the fewest units that leave at most `macs`.

    Args:
        net: the network; gradients that it has are used, and not those of the copy.
        macs: multiply-accumulates of one example.
        example: a batch of inputs.
        importance: from a group of the library to scores ``[units]``.
        ignore: the layers whose units all stay.
        seed: of random importance.

    Raises:
        ValueError: one unit a layer has more MACs.
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
        # Half a unit keeps the library's rounding off whole numbers.
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
        raise ValueError(f"{macs:.0f} MACs cannot be had: one unit a layer has {least}")
    return without(counts[index])
