"""Compare dense and pruned networks: MACs, parameters and measured latency."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from pyro_sbp.deployment.batches import batch_size, on_device, with_batch_size
from pyro_sbp.deployment.blocks import BLOCK, ratios, times_in_turn
from pyro_sbp.deployment.crosscheck import CrossCheck, cross_check
from pyro_sbp.deployment.intervals import CONFIDENCE, median_interval
from pyro_sbp.deployment.runtimes import ON_CPU, Start, check_runtimes, prepare
from pyro_sbp.errors import RequestError
from pyro_sbp.gates.attention import has_attention, separate_attention
from pyro_sbp.gates.copies import copy_network
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.noise import check_no_noise
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import shrink
from pyro_sbp.machine import NOISY, processor_name
from pyro_sbp.pruning.macs import count_parameters
from pyro_sbp.text_tables import table

__all__ = [
    "Comparison",
    "Latency",
    "benchmark",
    "device_name",
    "floor_network",
    "one_unit_network",
]


#: The duration of a block of calls on a GPU in seconds. It is long compared to synchronizing.
GPU_BLOCK = 5e-3

#: A function from the head and the rows of a table to its text.
Layout = Callable[[Sequence[str], Sequence[Sequence[Any]]], str]


@dataclass(frozen=True)
class Latency:
    """The latency of a dense and a pruned network: the median over blocks of calls, in milliseconds
    per call.

    Attributes:
        speedup: the median of the ratios of the two networks in groups of blocks (`ratios`). Other
            load affects both networks in a group, so it can differ slightly from the ratio of
            `dense_ms` and `pruned_ms`.
        spread: half the interquartile range divided by the median; the larger value of the two
            networks.
        floor_ms: the latency of the network with one unit per gate, which is a lower bound for all
            pruned networks. None if it was not measured.
        runtime: the runtime of the calls, one of `runtimes.RUNTIMES`.
        speedup_low, speedup_high: the confidence interval of `speedup`, from `median_interval`. It
            covers the variation within the measurement, not that between processes or machines.
            None in results of earlier versions.
        confidence: the smallest probability with which the interval contains the true median.
        blocks: the number of blocks of each network.
    """

    device: str
    threads: int
    batch_size: int
    dense_ms: float
    pruned_ms: float
    speedup: float
    spread: float
    floor_ms: float | None = None
    runtime: str = "eager"
    speedup_low: float | None = None
    speedup_high: float | None = None
    confidence: float = CONFIDENCE
    blocks: int | None = None

    @property
    def interval(self) -> str:
        """The confidence interval of the speed-up in words, or "-" if it is not known."""
        if self.speedup_low is None or self.speedup_high is None:
            return "-"
        return f"{self.speedup_low:.2f} to {self.speedup_high:.2f}"


@dataclass(frozen=True)
class Comparison:
    """The comparison of a dense and a pruned network. MACs are those at batch size 1.

    `str`, `print` and notebooks show tables of sizes and latencies.

    Attributes:
        dense_check, pruned_check: the MACs counted by ptflops, for comparison.
    """

    dense_macs: int
    pruned_macs: int
    dense_parameters: int
    pruned_parameters: int
    latencies: tuple[Latency, ...]
    dense_check: CrossCheck | None = None
    pruned_check: CrossCheck | None = None

    @property
    def macs_ratio(self) -> float:
        """The MACs of the dense network divided by those of the pruned network."""
        return self.dense_macs / self.pruned_macs

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"macs_ratio": self.macs_ratio}

    def size_table(self) -> str:
        """MACs and parameters of both networks as a text table."""
        sizes = {
            "MACs": (self.dense_macs, self.pruned_macs),
            "parameters": (self.dense_parameters, self.pruned_parameters),
        }
        rows = [
            (name, f"{dense:,}", f"{pruned:,}", f"{dense / pruned:.2f}x")
            for name, (dense, pruned) in sizes.items()
        ]
        return table(("", "dense", "pruned", "ratio"), rows)

    def latency_table(self, layout: Layout = table) -> str:
        """The latencies as a table, in milliseconds per call. The table has a column for the
        runtime if another runtime than eager was measured, and for the confidence interval and the
        floor if they are known.

        Args:
            layout: a function from the head and the rows to the text of the table, such as
                `markdown_table`.
        """
        runtimes = {latency.runtime for latency in self.latencies} != {"eager"}
        floors = any(latency.floor_ms is not None for latency in self.latencies)
        intervals = any(latency.speedup_low is not None for latency in self.latencies)
        head = ["device", *["runtime"] * runtimes, "threads", "batch", "dense ms", "pruned ms"]
        head += ["speed-up", *[f"{CONFIDENCE:.0%} interval"] * intervals, "spread"]
        rows = [
            (
                latency.device,
                *[latency.runtime] * runtimes,
                latency.threads,
                latency.batch_size,
                f"{latency.dense_ms:.3f}",
                f"{latency.pruned_ms:.3f}",
                f"{latency.speedup:.2f}x",
                *[latency.interval] * intervals,
                f"{latency.spread:.0%}",
                *["-" if latency.floor_ms is None else f"{latency.floor_ms:.3f}"] * floors,
            )
            for latency in self.latencies
        ]
        return layout([*head, *["floor"] * floors], rows)

    def __str__(self) -> str:
        tables = f"{self.size_table()}\n\n{self.latency_table()}"
        if any(latency.spread > NOISY for latency in self.latencies):
            tables += f"\na spread is over {NOISY:.0%}: the machine was busy; measure again"
        return tables

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the tables in IPython and notebooks."""
        printer.text(str(self))


def device_name(device: torch.device) -> str:
    """The name of the processor or graphics card of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def one_unit_network(net: nn.Module, gates: Sequence[Gate], example_input: Any) -> nn.Module:
    """The network with one unit in every gate. No pruned network is expected to be faster."""
    theta = {gate.name: torch.zeros(gate.size, device="cpu") for gate in gates}
    device = next(net.parameters()).device
    return shrink(net, gates, {k: v.to(device) for k, v in theta.items()}, example_input)


def floor_network(
    net: nn.Module, example_input: Any, input_features: Sequence[str] = ()
) -> nn.Module:
    """The `one_unit_network` of a network whose gates have not been found yet.

    Attention is separated first, so that every attention also has only one head.

    Args:
        net: the network; it is not changed.
        example_input, input_features: as for `find_gates`.
    """
    if has_attention(net):
        net = separate_attention(net)
    return one_unit_network(net, find_gates(net, example_input, input_features), example_input)


def benchmark(
    dense: nn.Module,
    pruned: nn.Module,
    example_input: Any,
    *,
    floor: nn.Module | None = None,
    batch_sizes: Sequence[int] = (1, 128),
    threads: Sequence[int] = (1,),
    devices: Sequence[str] | None = None,
    runtimes: Sequence[str] = ("eager",),
    calibration: Sequence[Any] = (),
    seconds: float = 2.0,
) -> Comparison:
    """Compare the MACs, the parameters and the latency of a dense and a pruned network.

    The networks are measured in turn, in blocks of calls, so that other load on the machine affects
    all of them. Each runtime is measured separately, after its outputs were compared with those of
    eager PyTorch.

    Args:
        dense: the original network.
        pruned: the smaller network.
        example_input: an input of any kind, as for `find_gates`. Its examples are repeated to reach
            the batch sizes. They are the rows of all tensors that are as long as the first tensor.
        floor: a third network to measure, from `floor_network`.
        batch_sizes: the numbers of examples per call; each is measured.
        threads: the numbers of CPU threads; each is measured.
        devices: "cpu", "cuda" or both; by default the CPU, and the GPU if there is one.
        runtimes: some of "eager", "compile" (`torch.compile` with Inductor, which discards what the
            process has compiled before), and "onnxruntime" and "int8" (on the CPU only).
        calibration: for "int8", batches of training inputs, on which the ranges of the activations
            are measured.
        seconds: the time for which each network is measured in each setting.

    Raises:
        RequestError: a runtime is unknown or not installed, "onnxruntime" or "int8" is requested
            without the CPU, or "int8" without calibration batches, or the noise of a `Pruner` is
            attached to a network.
        ExportError: a runtime cannot run a network, or its outputs differ from those of eager
            PyTorch.
    """
    check_runtimes(runtimes)
    for net in (dense, pruned):
        check_no_noise(net, "benchmarked")
    if devices is None:
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for runtime in set(runtimes) & set(ON_CPU):
        if all(torch.device(d).type != "cpu" for d in devices):
            raise RequestError(f"{runtime} is measured on the CPU only: add 'cpu' to the devices")
    if "int8" in runtimes and not calibration:
        raise RequestError("int8 needs batches of training inputs: give them as calibration")
    nets = {"dense": dense, "pruned": pruned} | ({"floor": floor} if floor is not None else {})
    latencies = []
    for name in devices:
        device = torch.device(name)
        placed = {key: copy_network(net).to(device).eval() for key, net in nets.items()}
        # Export all programs first, so that a failure appears before the measurements.
        starts = {
            runtime: {
                key: prepare(net, runtime, example_input, calibration)
                for key, net in placed.items()
                # The rounding errors of a network with one unit per gate may be too large in int8.
                if (key, runtime) != ("floor", "int8")
            }
            for runtime in runtimes
            if runtime not in ON_CPU or device.type == "cpu"
        }
        for size in batch_sizes:
            x = on_device(with_batch_size(example_input, size), device)
            for count in threads if device.type == "cpu" else (torch.get_num_threads(),):
                for runtime, of_nets in starts.items():
                    latencies.append(_latency(of_nets, x, device, count, seconds, runtime))
    checks = [cross_check(net, with_batch_size(example_input, 1)) for net in (dense, pruned)]
    return Comparison(
        checks[0].macs,
        checks[1].macs,
        count_parameters(dense),
        count_parameters(pruned),
        tuple(latencies),
        *checks,
    )


def _without_cuda_home(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found, using CUDA_HOME=")


def _latency(
    starts: Mapping[str, Start],
    x: Any,
    device: torch.device,
    threads: int,
    seconds: float,
    runtime: str,
) -> Latency:
    # torch.compile logs a warning on machines that have CUDA's compiler but no GPU.
    logging.getLogger("torch.utils.cpp_extension").addFilter(_without_cuda_home)

    def synchronizing() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    clock = synchronizing if device.type == "cuda" else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            calls = _started(starts, x, threads, runtime)
            block = GPU_BLOCK if device.type == "cuda" else BLOCK
            times = times_in_turn(calls, seconds, clock, block)
    finally:
        torch.set_num_threads(before)
    spread = {}
    for name in ("dense", "pruned"):
        low, middle, high = torch.tensor(times[name], dtype=torch.float64, device="cpu").quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device="cpu")
        )
        spread[name] = float((high - low) / (2 * middle))
    speedups = ratios(times["dense"], times["pruned"])
    speedup_low, speedup_high = median_interval(speedups)
    return Latency(
        device=f"{device.type}: {device_name(device)}",
        threads=threads,
        batch_size=batch_size(x),
        dense_ms=1e3 * median(times["dense"]),
        pruned_ms=1e3 * median(times["pruned"]),
        speedup=median(speedups),
        spread=max(spread.values()),
        floor_ms=1e3 * median(times["floor"]) if "floor" in times else None,
        runtime=runtime,
        speedup_low=speedup_low,
        speedup_high=speedup_high,
        blocks=len(times["dense"]),
    )


def _started(
    starts: Mapping[str, Start], x: Any, threads: int, runtime: str
) -> dict[str, Callable[[], Any]]:
    """By name, the call of each network on an input."""
    if runtime == "compile":
        # torch.compile keeps at most eight programs for one `forward`, and would fail for the
        # ninth.
        torch.compiler.reset()
    return {name: start(x, threads) for name, start in starts.items()}
