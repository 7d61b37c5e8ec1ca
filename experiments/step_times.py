"""Training speed of networks on this machine: `python -m pyro_sbp.experiments.step_times`.

It prints the milliseconds of a training step (forward, backward, SGD with momentum) by precision,
memory format, eager or compiled mode, and number of threads. All settings of a network with the
same number of threads are measured in turn, several times, so that other load on the machine
affects all of them. The ratio is relative to float32, contiguous, eager, with the same number of
threads.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from pyro_sbp import networks
from pyro_sbp.deployment.benchmarking import device_name
from pyro_sbp.training.devices import fastest_precision

__all__ = ["main", "step_times"]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": networks.resnet20,
    "vgg-like": networks.VGGLike,
}
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
#: Precision, memory format, and whether the network is compiled.
Setting = tuple[str, str, bool]


def _step(make: Callable[[], nn.Module], setting: Setting, batch: int) -> Callable[[], None]:
    precision, layout, compiled = setting
    torch.manual_seed(0)
    net = make().train().to(memory_format=FORMATS[layout])
    x = torch.randn(batch, 3, 32, 32).to(memory_format=FORMATS[layout])
    y = torch.randint(10, (batch,))
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, nesterov=True, fused=True)
    forward = torch.compile(net) if compiled else net

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = F.cross_entropy(forward(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def step_times(
    make: Callable[[], nn.Module], settings: Sequence[Setting], batch: int, repeats: int
) -> list[float]:
    """Median seconds of a step in every setting, measured in turn.

    Args:
        make: builds the network, for images ``[3, 32, 32]``.
        settings: precision, memory format, and whether the network is compiled.
        batch: the number of images in a step.
        repeats: how often each setting is measured, after one step of warm-up.
    """
    steps = [_step(make, setting, batch) for setting in settings]
    for step in steps:
        step()
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, seconds in zip(steps, times, strict=True):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in times]


def main() -> None:
    """Print one table for every network and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=NETWORKS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--precision", action="append", help="default: 32-true and bf16-mixed")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    options = parser.parse_args()
    device = torch.device("cpu")
    print(f"{device_name(device)}; torch {torch.__version__}; auto: {fastest_precision('cpu')}")
    compiled = (False,) if options.no_compile else (False, True)
    precisions = options.precision or ["32-true", "bf16-mixed"]
    settings: list[Setting] = list(itertools.product(precisions, FORMATS, compiled))
    for arch in options.arch or NETWORKS:
        for threads in options.threads or (1, 2):
            torch.set_num_threads(threads)
            torch.compiler.reset()
            seconds = step_times(NETWORKS[arch], settings, options.batch_size, options.repeats)
            print(f"\n{arch}, batch {options.batch_size}, {threads} threads")
            print(
                "| precision | memory format | mode | ms a step | speed-up |\n|---|---|---|---|---|"
            )
            for (precision, layout, compile_), value in zip(settings, seconds, strict=True):
                mode = "compiled" if compile_ else "eager"
                print(
                    f"| {precision} | {layout} | {mode} | {1000 * value:.0f} "
                    f"| {seconds[0] / value:.2f}x |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
