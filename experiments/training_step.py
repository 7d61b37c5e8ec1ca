"""Measure the time of a training step with noise: `python -m pyro_sbp.experiments.training_step`.

It prints the milliseconds per step of the dense network, of SBP written by hand in torch with the
formulas of `pyro_sbp.special`, and of this package with its own ELBO, with Pyro's ELBO, and with
Pyro's SVI. All steps are measured in turn in one run, so that other load on the machine affects all
of them. Compare the ratios to the dense step, not the milliseconds. `--parts` shows how the time of
the closed form is spent. `--batch-sizes` shows how it grows with the batch size. `--method
sparse-vd` measures noise on weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import ELBO, SVI, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_sbp import networks, special
from pyro_sbp.deployment.benchmarking import device_name
from pyro_sbp.distributions import TruncatedLogNormal
from pyro_sbp.distributions.log_uniform_kl import K1, K2, K3
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.models.elbo import ClosedFormELBO
from pyro_sbp.models.gated_guide import TruncatedLogNormalGuide
from pyro_sbp.models.gated_model import LOG_HIGH, LOG_LOW, GatedModel
from pyro_sbp.models.sparse_guide import AdditiveNormalGuide
from pyro_sbp.models.sparse_model import SparseModel

__all__ = ["main", "steps"]

NoisePer = Literal["batch", "example"]
#: A function from images and labels of a minibatch to its loss.
Loss = Callable[[Tensor, Tensor], Tensor]

NUM_DATA = 60_000
NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "lenet-500-300": (networks.LeNet500_300, (1, 28, 28), ("fc1",)),
    "lenet5": (networks.LeNet5, (1, 28, 28), ("fc1",)),
    "vgg-like": (networks.VGGLike, (3, 32, 32), ()),
}
SPARSE_NETWORKS = {
    "lenet-300-100": (networks.LeNet300_100, (1, 28, 28), ()),
    "lenet5": NETWORKS["lenet5"],
}


def _frozen(net: nn.Module) -> nn.Module:
    """Make batch norms use their running statistics, as in the gated phase, for all
    measurements.
    """
    net.train()
    for module in net.modules():
        if "BatchNorm" in type(module).__name__:
            module.eval()
    return net


def _by_hand(net: nn.Module, gates: list[Gate], noise_per: NoisePer) -> tuple[list[Tensor], Loss]:
    """SBP without Pyro: its parameters, and the function for the loss of a minibatch."""
    device = next(net.parameters()).device
    low, high = (torch.full((), bound, device=device) for bound in (LOG_LOW, LOG_HIGH))
    loc = {g.name: torch.zeros(g.size, device=device, requires_grad=True) for g in gates}
    log_scale = {g.name: torch.full_like(t, -5.0).requires_grad_() for g, t in
                 zip(gates, loc.values(), strict=True)}  # fmt: skip
    gated = GatedNetwork(net, gates)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        kl: Tensor | float = 0.0
        theta = {}
        for gate in gates:
            scale = log_scale[gate.name].exp()
            q = TruncatedLogNormal(loc[gate.name], scale, low, high, validate_args=False)
            theta[gate.name] = q.rsample((len(x),) if noise_per == "example" else ())
            kl = kl + special.kl_to_uniform(loc[gate.name], scale, low, high).sum()
        return F.cross_entropy(gated(x, theta), y) + kl / NUM_DATA

    return [*net.parameters(), *loc.values(), *log_scale.values()], loss


def steps(
    name: str, batch_size: int, noise_per: NoisePer, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Functions that take one training step in different ways, by name."""
    make, shape, features = NETWORKS[name]
    x = torch.rand(batch_size, *shape, device=device)
    y = torch.randint(10, (batch_size,), device=device)
    gates = find_gates(make(), torch.rand(2, *shape), features)

    def stepper(parameters: Sequence[Tensor], loss: Loss) -> Callable[[], object]:
        optimizer = torch.optim.Adam(parameters, fused=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss(x, y).backward()
            optimizer.step()

        return step

    def stepper_of(elbo: ELBO) -> Callable[[], object]:
        model, guide = model_and_guide()
        loss = elbo(model, guide)
        parameters = [*model.gated.net.parameters(), *guide.parameters()]
        return stepper(parameters, lambda x, y: loss(x, y) / NUM_DATA)

    def model_and_guide() -> tuple[GatedModel, TruncatedLogNormalGuide]:
        model = GatedModel(_frozen(make().to(device)), gates, NUM_DATA, noise_per=noise_per)
        return model, TruncatedLogNormalGuide(model).to(device)

    dense = _frozen(make().to(device))
    found = {"dense": stepper(list(dense.parameters()), lambda x, y: F.cross_entropy(dense(x), y))}
    found["by hand"] = stepper(*_by_hand(_frozen(make().to(device)), gates, noise_per))
    found["closed form"] = stepper_of(ClosedFormELBO())
    found["mean field"] = stepper_of(TraceMeanField_ELBO())
    model, guide = model_and_guide()
    svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 1e-3}), TraceMeanField_ELBO())
    found["SVI"] = lambda: svi.step(x, y)
    return found


class _SparseByHand(nn.Module):
    """A layer of sparse variational dropout, written by hand in torch (arXiv 1701.05369)."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.log_variance = nn.Parameter(torch.full_like(layer.weight, -10.0))
        self.function = F.linear if isinstance(layer, nn.Linear) else F.conv2d

    def forward(self, x: Tensor) -> Tensor:
        mean = self.function(x, self.weight, self.bias)
        variance = self.function(x * x, self.log_variance.exp())
        return mean + (variance + 1e-8).sqrt() * torch.randn_like(mean)

    def kl(self) -> Tensor:
        log_alpha = (self.log_variance - (self.weight * self.weight + 1e-8).log()).clamp(-8, 8)
        negative = K1 * torch.sigmoid(K2 + K3 * log_alpha) - 0.5 * F.softplus(-log_alpha) - K1
        return -negative.sum()


def sparse_steps(
    name: str, batch_size: int, noise_per: NoisePer, device: torch.device
) -> dict[str, Callable[[], object]]:
    """The same as `steps` for SparseVD. The noise is drawn in the outputs of the layers for every
    example.
    """
    make, shape, _ = SPARSE_NETWORKS[name]
    x = torch.rand(batch_size, *shape, device=device)
    y = torch.randint(10, (batch_size,), device=device)

    def stepper(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
        optimizer = torch.optim.Adam(module.parameters(), fused=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()

        return step

    def stepper_of(elbo: ELBO) -> Callable[[], object]:
        model = SparseModel(make().to(device), x[:2], NUM_DATA)
        loss = elbo(model, AdditiveNormalGuide(model))
        return stepper(model, lambda: loss(x, y) / NUM_DATA)

    dense, by_hand = make().to(device), make().to(device)
    layers = {}
    for path, layer in list(by_hand.named_modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layers[path] = _SparseByHand(layer)
            parent, _, leaf = path.rpartition(".")
            setattr(by_hand.get_submodule(parent), leaf, layers[path])

    def hand_loss() -> Tensor:
        kl = sum(layer.kl() for layer in layers.values())
        return F.cross_entropy(by_hand(x), y) + kl / NUM_DATA

    found = {"dense": stepper(dense, lambda: F.cross_entropy(dense(x), y))}
    found["by hand"] = stepper(by_hand, hand_loss)
    found["closed form"] = stepper_of(ClosedFormELBO())
    found["mean field"] = stepper_of(TraceMeanField_ELBO())
    return found


def parts(
    name: str, batch_size: int, noise_per: NoisePer, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Functions for the dense step, the closed form, and the parts of it that can run separately,
    by name.
    """
    found = steps(name, batch_size, noise_per, device)
    make, shape, features = NETWORKS[name]
    x = torch.rand(batch_size, *shape, device=device)
    y = torch.randint(10, (batch_size,), device=device)
    gates = find_gates(make(), torch.rand(2, *shape), features)
    net = _frozen(make().to(device))
    gated = GatedNetwork(net, gates)
    batch = (batch_size,) if noise_per == "example" else ()
    theta = {g.name: torch.rand(*batch, g.size, device=device, requires_grad=True) for g in gates}
    optimizer = torch.optim.Adam([*net.parameters(), *theta.values()], fused=True)

    def with_noise() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(gated(x, theta), y).backward()
        optimizer.step()

    guide = TruncatedLogNormalGuide(GatedModel(net, gates, NUM_DATA)).to(device)
    sizes = [gate.size for gate in gates]
    low, high = (torch.full((), bound, device=device) for bound in (LOG_LOW, LOG_HIGH))

    def noise() -> None:
        loc = torch.cat(list(guide.locs.parameters()))
        scale = torch.cat(list(guide.log_scales.parameters())).exp()
        whole = TruncatedLogNormal(loc, scale, low, high, validate_args=False)
        draws = [q.rsample(batch).sum() for q in (whole.split(sizes) if not batch else [whole])]
        (special.kl_to_uniform(loc, scale, low, high).sum() + sum(draws)).backward()

    return {
        "dense": found["dense"],
        "by given noise": with_noise,
        "draw and KL": noise,
        "closed form": found["closed form"],
    }


def _parts_line(times: dict[str, list[float]]) -> str:
    median = {name: statistics.median(values) for name, values in times.items()}
    multiply = median["by given noise"] - median["dense"]
    rest = median["closed form"] - median["by given noise"] - median["draw and KL"]
    values = (median["dense"], multiply, median["draw and KL"], rest)
    return " | ".join(f"{ms:.2f} ({ms / median['dense']:.2f}x)" for ms in values)


def _measure(
    found: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """The milliseconds of every step, by name. On one CPU thread they are processor time."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = (
        time.process_time if alone else time.perf_counter
    )  # time of other processes is not counted
    times: dict[str, list[float]] = {name: [] for name in found}
    for index in range(rounds + 2):
        for name, step in found.items():
            start = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if index >= 2:
                times[name].append(1e3 * (clock() - start))
    return times


def _line(times: dict[str, list[float]], batch_size: int) -> str:
    median = {name: statistics.median(values) for name, values in times.items()}
    spread = {}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        spread[name] = (high - low) / 2
    cells = [f"{median['dense']:.2f} ± {spread['dense']:.2f}"]
    cells += [
        f"{median[name]:.2f} ± {spread[name]:.2f} ({median[name] / median['dense']:.2f}x)"
        for name in times
        if name != "dense"
    ]
    cells.append(f"{1e3 * batch_size / median['closed form']:,.0f}")
    return " | ".join(cells)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = {**NETWORKS, **SPARSE_NETWORKS}
    parser.add_argument("networks", nargs="*", help=", ".join(known))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="[default: 128, or 32]")
    parser.add_argument("--parts", action="store_true", help="show how the time is spent")
    parser.add_argument("--method", choices=("sbp", "sparse-vd"), default="sbp")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    pyro.enable_validation(False)
    print(f"{device_name(device)}, {torch.get_num_threads()} thread(s), {options.rounds} rounds,")
    print("ms a step, median ± half the interquartile range (times the dense step)\n")
    sparse = options.method == "sparse-vd"
    make = sparse_steps if sparse else parts if options.parts else steps
    if sparse:
        head = "dense | by hand | closed form | mean field | images/s of the closed form"
    elif options.parts:
        head = "dense | noise into the network | draw and KL | the rest, mostly Pyro"
    else:
        head = "dense | by hand | closed form | mean field | SVI | images/s of the closed form"
    print(f"| network, batch | noise per | {head} |")
    print(f"|---|---|{'---|' * (head.count('|') + 1)}")
    there = SPARSE_NETWORKS if sparse else NETWORKS
    unknown = set(options.networks) - there.keys()
    if unknown or (sparse and options.parts):
        parser.error(f"sbp is measured on {', '.join(NETWORKS)}, sparse-vd on "
                     f"{', '.join(SPARSE_NETWORKS)} and without --parts")  # fmt: skip
    every: tuple[NoisePer, ...] = ("example",) if sparse else ("batch", "example")
    for name in options.networks or there:
        usual = 32 if name == "vgg-like" and device.type == "cpu" else 128
        for size in options.batch_sizes or [usual]:
            for noise_per in every:
                found = make(name, size, noise_per, device)
                times = _measure(found, options.rounds, device)
                row = _parts_line(times) if options.parts else _line(times, size)
                print(f"| {name}, {size} | {noise_per} | {row} |", flush=True)


if __name__ == "__main__":
    main()
