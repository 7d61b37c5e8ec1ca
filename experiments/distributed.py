"""An example of pruning in several processes, which train a small network in step.

    torchrun --nproc-per-node 2 -m pyro_sbp.experiments.distributed
    python -m pyro_sbp.experiments.distributed

Both print the same number of units and end at the same parameters, up to rounding: every process
draws the same noise, and gets a share of every minibatch. With ``--own-noise`` every process draws
different noise, so that the gradient is averaged over one draw for each process. With ``--steps
1000`` the network learns its task. The error of the pruned network on new examples is printed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_sbp.pruning.pruner import Pruner

__all__ = ["Trained", "main", "train"]


class Trained(NamedTuple):
    """The result of training in one process.

    Attributes:
        state: the parameters of the network and of the posterior.
        units: the number of units by gate.
        error: the error of the pruned network on new examples, in percent.
    """

    state: dict[str, Tensor]
    units: dict[str, int]
    error: float


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs ``[count, 10]`` and their classes: whether the first two have the same sign."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 10, generator=make, dtype=torch.float64, device="cpu")
    return x, (x[:, 0] * x[:, 1] > 0).long()


def train(steps: int = 20, own_noise: bool = False, seed: int = 0) -> Trained:
    """Train a small network with noise, in float64, in every process of the group if there is one.

    Args:
        steps: the number of steps of the optimizer, with minibatches of 32 examples over all
            processes.
        own_noise: whether every process draws different noise.
        seed: the seed of the initial weights, the noise and the order of the examples.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    processes = dist.get_world_size() if dist.is_initialized() else 1
    x, y = examples(256, seed=0)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    ).double()
    pruner = Pruner(
        net, x[:2], len(x), kl_scale=0.3, noise_learning_rate=0.05, init_log_scale=-1.0
    ).attach()
    pruner.guide.double()  # by default the posterior is in float32
    optimizer = torch.optim.Adam(pruner.parameters(lr=1e-2))
    parallel = DistributedDataParallel(net) if dist.is_initialized() else net
    torch.manual_seed(1_000 + seed + (rank if own_noise else 0))
    order = torch.Generator().manual_seed(seed)  # the same in every process
    for _ in range(steps):
        batch = torch.randperm(len(x), generator=order, device="cpu")[:32][rank::processes]
        optimizer.zero_grad()
        loss = F.cross_entropy(parallel(x[batch]), y[batch]) + pruner.kl_loss()
        loss.backward()
        pruner.average_gradients()
        optimizer.step()
    state = {**net.state_dict(), **pruner.state_dict()}
    x, y = examples(4_096, seed=1)
    with torch.no_grad():
        wrong = pruner.prune()(x).argmax(1) != y
    return Trained(state, pruner.units(), 100 * float(wrong.double().mean()))


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
    """Train, and print the number of remaining units."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--own-noise", action="store_true", help="draw different noise in each process"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the parameters to this file")
    options = parser.parse_args(arguments)
    several = "RANK" in os.environ  # set by torchrun
    if several:
        dist.init_process_group("gloo")
    found = train(options.steps, options.own_noise, options.seed)
    spread, first = (_spread(found.state), dist.get_rank() == 0) if several else (0.0, True)
    if first:
        print(
            f"units {found.units}, error {found.error:.1f} %, "
            f"largest difference between processes {spread:.1e}"
        )
        if options.output is not None:
            numbers = {"spread": spread, "error": found.error}
            more = {name: torch.tensor(value, device="cpu") for name, value in numbers.items()}
            torch.save({**found.state, **more}, options.output)
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
