"""The measurements of `pyro-sbp bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from pyro_sbp.architectures import find_architecture
from pyro_sbp.cli.quantized import Quantized, calibration_batches, compare, run_data
from pyro_sbp.deployment.benchmarking import Comparison, benchmark, floor_network
from pyro_sbp.deployment.loading import load
from pyro_sbp.deployment.memory import file_size, peak_memory
from pyro_sbp.deployment.quantization import quantize
from pyro_sbp.deployment.runtimes import ON_CPU, check_runtimes
from pyro_sbp.errors import RequestError
from pyro_sbp.machine import cpu_governor
from pyro_sbp.recipes.request import Request

__all__ = ["Measured", "Settings", "measure_run"]

#: The number of random images on which the networks are compared and measured.
EXAMPLES = 8


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement.

    Attributes:
        batch_sizes, threads, runtimes, seconds: as for `benchmark`. Without `threads`, one thread
            and torch's number of threads are measured.
        channels_last: whether the networks use the channels-last memory format.
    """

    batch_sizes: tuple[int, ...]
    threads: tuple[int, ...]
    runtimes: tuple[str, ...]
    seconds: float
    channels_last: bool


@dataclass(frozen=True)
class Measured:
    """The measurements of the dense and the pruned network of a run.

    Attributes:
        comparison: their MACs, parameters and latencies.
        sizes: the bytes of their files and of their peak memory, by the name in `bench.json`.
        quantized: the pruned network in int8; None if it was not measured.
        governor: the CPU governor; None if it is not readable.
    """

    comparison: Comparison
    sizes: dict[str, int]
    quantized: Quantized | None
    governor: str | None

    def ptflops(self) -> dict[str, int | None]:
        """The MACs by the count of ptflops, of the dense and the pruned network."""
        checks = {"dense": self.comparison.dense_check, "pruned": self.comparison.pruned_check}
        return {name: None if check is None else check.ptflops for name, check in checks.items()}

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `bench.json`: every latency, with the numbers that do not depend on it."""
        counted = self.ptflops()
        common: dict[str, Any] = {
            "governor": self.governor,
            "dense_macs": self.comparison.dense_macs,
            "pruned_macs": self.comparison.pruned_macs,
            "dense_macs_ptflops": counted["dense"],
            "pruned_macs_ptflops": counted["pruned"],
        }
        common |= self.sizes
        common |= {} if self.quantized is None else asdict(self.quantized)
        return [asdict(latency) | common for latency in self.comparison.latencies]


def measure_run(
    request: Request,
    saved: Path,
    kwargs: dict[str, Any],
    input_shape: Sequence[int],
    settings: Settings,
    threads: int,
) -> Measured:
    """Measure the dense and the pruned network of a run in turn.

    Args:
        request: the request of the run.
        saved: the directory of the pruned network.
        kwargs, input_shape: the arguments of its constructor and the shape of one input.
        settings: the settings of the measurement.
        threads: the number of CPU threads of torch.

    Raises:
        RequestError: the network cannot be loaded, or a runtime cannot be used.
    """
    with_int8 = "int8" in settings.runtimes
    # int8 is compared with eager.
    runtimes = tuple(dict.fromkeys((*["eager"] * with_int8, *settings.runtimes)))
    check_runtimes(runtimes)
    architecture = find_architecture(request.arch)
    dense, pruned = _networks(architecture.resolve(), saved, kwargs)
    example = torch.rand(EXAMPLES, *input_shape)
    floor = floor_network(dense, example, architecture.input_features)
    data = run_data(request) if with_int8 else None
    calibration = [] if data is None else calibration_batches(data, request.seed)
    if settings.channels_last:
        dense, pruned, floor = (
            net.to(memory_format=torch.channels_last) for net in (dense, pruned, floor)
        )
        example = example.to(memory_format=torch.channels_last)
    torch.set_num_threads(threads)
    counts = settings.threads or tuple(sorted({1, torch.get_num_threads()}))
    _announce(settings, len(counts), runtimes)
    comparison = benchmark(
        dense,
        pruned,
        example,
        floor=floor,
        batch_sizes=settings.batch_sizes,
        threads=counts,
        runtimes=runtimes,
        calibration=calibration,
        seconds=settings.seconds,
    )
    return Measured(
        comparison,
        _sizes(dense, pruned, example[:1].clone()),
        None if data is None else compare(pruned, quantize(pruned, calibration), data),
        cpu_governor(),
    )


def _networks(
    constructor: Callable[..., nn.Module], saved: Path, kwargs: dict[str, Any]
) -> tuple[nn.Module, nn.Module]:
    """A dense network with random weights, and the pruned network."""
    try:
        pruned = load(saved, constructor)
    except ValueError as error:
        raise RequestError(str(error)) from error
    return constructor(**kwargs).eval(), pruned


def _announce(settings: Settings, threads: int, runtimes: Sequence[str]) -> None:
    """Print how long the measurement takes, with `threads` numbers of CPU threads."""
    on_gpu = len({*runtimes} - {*ON_CPU}) * torch.cuda.is_available()
    number = len(settings.batch_sizes) * (threads * len(runtimes) + on_gpu)
    words = ", plus the time to compile" if tuple(runtimes) != ("eager",) else ""
    click.echo(f"measuring for about {3 * settings.seconds * number:.0f} s{words}", err=True)


def _sizes(dense: nn.Module, pruned: nn.Module, image: torch.Tensor) -> dict[str, int]:
    """The bytes of the files of two networks, and of their peak memory for one image."""
    nets = {"dense": dense, "pruned": pruned}
    sizes = {f"{name}_file_bytes": file_size(net) for name, net in nets.items()}
    return sizes | {f"{name}_peak_bytes": peak_memory(net, image) for name, net in nets.items()}
