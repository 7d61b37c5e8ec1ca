"""Measure how much the units of a network add to its latency on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from pyro_sbp.deployment.batches import on_device, with_batch_size
from pyro_sbp.gates.calling import call
from pyro_sbp.gates.copies import copy_network
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.surgery import shrink

__all__ = ["UnitLatency", "measure_unit_latency"]

#: Numbers of units above the same multiple of 16. Their latencies increase in steps if kernels
#: process whole vectors of channels.
STEPS = (1, 2, 4, 8, 16)
#: Every network is measured at least this many times.
ROUNDS = 5


@dataclass(frozen=True)
class UnitLatency:
    """The latency of a network as a function of the number of units of each of its gates.

    Attributes:
        sizes: by gate, the number of units.
        milliseconds: by gate, pairs of a number of units and the latency in milliseconds of the
            network that keeps this number of units of the gate and all units of the other gates, in
            ascending order. The last pair is that of the dense network.
        batch_size, threads, device: the conditions of the measurement.
    """

    sizes: Mapping[str, int]
    milliseconds: Mapping[str, Sequence[tuple[int, float]]]
    batch_size: int
    threads: int
    device: str

    def per_unit(self) -> dict[str, float]:
        """The latency of one unit in milliseconds, by gate.

        It is the slope of the least-squares line through the measured latencies, or 0 if the slope
        is negative. Removing a single unit may save no time, because kernels process whole vectors
        of channels.
        """
        slopes = {}
        for gate, pairs in self.milliseconds.items():
            table = torch.tensor(pairs, dtype=torch.float64, device="cpu")
            x, y = (table - table.mean(0)).T
            square = float(x @ x)
            slopes[gate] = max(0.0, float(x @ y) / square) if square else 0.0
        return slopes

    def relative(self) -> dict[str, float]:
        """`per_unit`, divided by its mean over all units of all gates.

        Raises:
            ValueError: the latency does not depend on the units of any gate.
        """
        costs = self.per_unit()
        mean = sum(costs[gate] * size for gate, size in self.sizes.items())
        mean /= sum(self.sizes.values())
        if not mean > 0:
            raise ValueError(
                "the latency of the network does not depend on the units of any gate; measure a "
                "larger batch, or use the cost 'macs'"
            )
        return {gate: cost / mean for gate, cost in costs.items()}

    def round_to(self, tolerance: float = 0.02) -> int:
        """The largest multiple to which the units of every gate can be rounded up without making
        the network slower.

        Args:
            tolerance: the largest accepted increase of the latency, summed over the gates and
                relative to the dense network.

        Returns:
            1, 2, 4, 8 or 16.
        """
        whole = max(pairs[-1][1] for pairs in self.milliseconds.values())
        free = 1
        for step in STEPS[1:]:
            more = 0.0
            for gate, size in self.sizes.items():
                found, start = dict(self.milliseconds[gate]), first_step(size)
                if {start + 1, start + step} <= found.keys():
                    more += max(0.0, found[start + step] - found[start + 1])
            if more > tolerance * whole:
                break
            free = step
        return free

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UnitLatency:
        """The latencies from the values that `to_dict` returned.

        Raises:
            ValueError: a value is missing or has a wrong type.
        """
        try:
            milliseconds = {
                str(gate): [(int(units), float(ms)) for units, ms in pairs]
                for gate, pairs in values["milliseconds"].items()
            }
            sizes = {str(gate): int(size) for gate, size in values["sizes"].items()}
            found = cls(
                sizes,
                milliseconds,
                int(values["batch_size"]),
                int(values["threads"]),
                str(values["device"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the latencies of units are damaged: {error!r}") from error
        if sizes.keys() != milliseconds.keys() or not all(milliseconds.values()):
            raise ValueError(
                "the latencies of units are damaged: the gates of sizes and milliseconds differ"
            )
        return found


def first_step(size: int) -> int:
    """The multiple of 16 near half of `size` after which steps are measured."""
    return 16 * (size // 32)


def widths(size: int) -> list[int]:
    """The numbers of units at which a gate of `size` units is measured, in ascending order."""
    steps = (first_step(size) + step for step in STEPS)
    parts = (size // 4, size // 2, 3 * size // 4, size)
    return sorted({width for width in (*steps, *parts) if 1 <= width <= size})


def measure_unit_latency(
    net: nn.Module,
    gates: Sequence[Gate],
    example_input: Any,
    *,
    batch_size: int = 128,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> UnitLatency:
    """Measure how the latency of a network depends on the number of units of each gate.

    For every gate, networks with fewer units of this gate are built. All networks are measured in
    turn, so that other load on the machine affects all of them. The latency of a network is the
    median over its calls.

    Args:
        net: the network; it is not changed. The latency is that on its device.
        gates: its gates.
        example_input: an input of the network. Its examples are repeated to reach the batch size.
        batch_size: the number of examples per call.
        seconds: the duration of the measurement. Every network is called at least five times.
        clock: a function that returns the time in seconds.
    """
    device = next(net.parameters()).device
    x = on_device(with_batch_size(example_input, batch_size), device)
    dense = copy_network(net).eval()
    nets: dict[tuple[str, int], nn.Module] = {("", 0): dense}
    for gate in gates:
        for width in widths(gate.size)[:-1]:
            theta = (torch.arange(gate.size, device=device) < width).to(next(net.parameters()))
            small = shrink(dense, gates, {gate.name: theta}, example_input)
            nets[gate.name, width] = small.eval()
    times = _in_turn(nets, x, device, seconds, clock)
    whole = times["", 0]
    return UnitLatency(
        {gate.name: gate.size for gate in gates},
        {
            gate.name: [
                (width, whole if width == gate.size else times[gate.name, width])
                for width in widths(gate.size)
            ]
            for gate in gates
        },
        batch_size,
        torch.get_num_threads(),
        device.type,
    )


def _in_turn(
    nets: Mapping[tuple[str, int], nn.Module],
    x: Any,
    device: torch.device,
    seconds: float,
    clock: Callable[[], float],
) -> dict[tuple[str, int], float]:
    """The median latency of every network in milliseconds."""

    def timed(net: nn.Module) -> float:
        begin = clock()
        call(net, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (clock() - begin)

    with torch.inference_mode():
        for net in nets.values():
            timed(net)  # the first call allocates memory and chooses algorithms
        found: dict[tuple[str, int], list[float]] = {key: [] for key in nets}
        start, rounds = clock(), 0
        while rounds < ROUNDS or clock() - start < seconds:
            for key, net in nets.items():
                found[key].append(timed(net))
            rounds += 1
    return {key: median(values) for key, values in found.items()}
