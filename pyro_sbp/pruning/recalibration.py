"""Measure batch norm statistics again after the activations of a network have changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_sbp.gates.calling import call, evaluating

__all__ = ["recalibrate_batch_norm"]


def recalibrate_batch_norm(net: nn.Module, batches: Iterable[Any]) -> None:
    """Set the running statistics of batch norms to their mean over batches, in place.

    Pruning changes the inputs of batch norms, but their running statistics are still those of the
    network with noise. Weights are not changed. For a network without batch norm it does nothing,
    and reads no batch.

    Args:
        net: the network.
        batches: inputs of the network. All batches have the same weight.

    Raises:
        ValueError: there is no batch.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("there are no batches to measure batch norm statistics on")
    momentum = [norm.momentum for norm in norms]
    with torch.no_grad(), evaluating(net):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            for batch in itertools.chain([first], batches):
                call(net, batch)
        finally:
            for norm, value in zip(norms, momentum, strict=True):
                norm.momentum = value
