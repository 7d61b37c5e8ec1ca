"""Pruning in several processes: a small network, trained with noise in step.

    torchrun --nproc-per-node 2 -m pyro_sbp.experiments.distributed
    python -m pyro_sbp.experiments.distributed

Both print the same number of units and end at the same parameters, up to rounding: every process
draws the same noise, and has its share of every minibatch. With ``--own-noise`` every process draws
its own, which averages the gradient over as many draws of the noise.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_sbp.pruning.pruner import Pruner

__all__ = ["main", "train"]


def train(steps: int = 20, own_noise: bool = False) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Train a small network with noise, in float64, in every process of the group if there is one.

    Args:
        steps: of the optimizer, with minibatches of 32 over all processes.
        own_noise: whether every process draws different noise.

    Returns:
        The parameters of the network and of the posterior, and the units by gate.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    processes = dist.get_world_size() if dist.is_initialized() else 1
    make = torch.Generator().manual_seed(0)
    x = torch.randn(256, 10, generator=make, dtype=torch.float64, device="cpu")
    y = (x[:, 0] * x[:, 1] > 0).long()
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    ).double()
    pruner = Pruner(
        net, x[:2], len(x), kl_scale=0.3, noise_learning_rate=0.05, init_log_scale=-1.0
    ).attach()
    pruner.guide.double()  # by default the posterior is in float32
    optimizer = torch.optim.Adam(pruner.parameters(lr=1e-2))
    parallel = DistributedDataParallel(net) if dist.is_initialized() else net
    torch.manual_seed(2 + (rank if own_noise else 0))
    order = torch.Generator().manual_seed(3)  # the same in every process
    for _ in range(steps):
        batch = torch.randperm(len(x), generator=order, device="cpu")[:32][rank::processes]
        optimizer.zero_grad()
        loss = F.cross_entropy(parallel(x[batch]), y[batch]) + pruner.kl_loss()
        loss.backward()
        pruner.average_gradients()
        optimizer.step()
    return {**net.state_dict(), **pruner.state_dict()}, pruner.units()


def _spread(state: dict[str, Tensor]) -> float:
    """The largest difference between the parameters of the processes."""
    spread = 0.0
    for value in state.values():
        least, most = value.clone(), value.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        spread = max(spread, float((most - least).max()))
    return spread


def main(arguments: list[str] | None = None) -> None:
    """Train, and print the units that are left."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--own-noise", action="store_true", help="draw other noise in each process")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the parameters to this file")
    options = parser.parse_args(arguments)
    several = "RANK" in os.environ  # set by torchrun
    if several:
        dist.init_process_group("gloo")
    state, units = train(options.steps, options.own_noise)
    spread, first = (_spread(state), dist.get_rank() == 0) if several else (0.0, True)
    if first:
        print(f"units {units}, largest difference between processes {spread:.1e}")
        if options.output is not None:
            torch.save({**state, "spread": torch.tensor(spread, device="cpu")}, options.output)
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
