"""Cut a network with Torch-Pruning, by the same masks as in the survey."""

from __future__ import annotations

import time
from typing import Any

import torch

from pyro_sbp.errors import first_line
from pyro_sbp.experiments.survey.measurement import Prepared, macs_left
from pyro_sbp.gates.copies import copy_network, fresh
from pyro_sbp.gates.decisions import Decisions
from pyro_sbp.gates.layers import num_rows
from pyro_sbp.gates.sizes import set_sizes

__all__ = ["compare"]


def compare(prepared: Prepared) -> dict[str, Any]:
    """The record of a network that Torch-Pruning has cut.

    Torch-Pruning gets the rows of the removed units for every writer that it has not already cut
    together with another one. Numbers of heads that the code of the network needs are set to the
    number of kept units of the gate.

    Returns:
        ``max_rel_diff`` (the difference from the masked network), ``macs_left`` and
        ``cpu_seconds``; or ``failed`` with the error message.
    """
    theta = {name: (value != 0).double() for name, value in prepared.theta.items()}
    decisions = Decisions()
    expected = prepared.masked(theta, decisions)
    start = time.process_time()
    try:
        small = _cut(prepared)
        difference = prepared.difference(small.eval(), expected, decisions)
        left = macs_left(prepared.net, small, prepared.x)
    except Exception as error:  # Torch-Pruning and the cut network may raise anything
        return {"failed": first_line(error)[:200]}
    seconds = time.process_time() - start
    return {"max_rel_diff": difference, "macs_left": left, "cpu_seconds": round(seconds, 2)}


def _cut(prepared: Prepared) -> torch.nn.Module:
    import torch_pruning as tp

    net = copy_network(prepared.net).requires_grad_(True)
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=fresh(prepared.x))
    for gate in prepared.gates:
        kept = prepared.theta[gate.name] != 0
        for span in gate.writers:
            layer = net.get_submodule(span.layer)
            if span.tensor or num_rows(layer) < len(span.units):
                continue  # cut with another writer
            cut = graph.get_pruner_of_module(layer).prune_out_channels
            gone = torch.nonzero((span.units >= 0) & ~kept[span.units]).flatten().tolist()
            graph.get_pruning_group(layer, cut, idxs=gone).prune()
        set_sizes(net, gate, int(kept.sum()))
    return net
