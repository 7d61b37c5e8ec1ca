"""A budget for the latency: a speed-up over the dense network."""

from __future__ import annotations

from collections.abc import Callable

from pyro_sbp.deployment.benchmarking import Latency, benchmark
from pyro_sbp.pruning.budgets import Budget, Candidates

__all__ = ["Speedup"]

#: How many times longer the network that was found is measured than the candidates.
LONGER = 4


class Speedup(Budget):
    """A network that is at least `target` times faster than the dense one on this machine.

    The budget selects the largest such network. Every candidate is measured in turn with the dense
    network, in blocks of calls. Because latencies vary, the selected network is measured again for
    a longer time. The budget is met if the whole confidence interval of its speed-up is at least
    the target. Otherwise a smaller candidate is measured, and so on.

    Args:
        target: the latency of the dense network divided by that of the smaller network.
        batch_size: the number of examples per call.
        runtime: "eager", "compile" or "onnxruntime", as for `benchmark`.
        threads: the number of CPU threads.
        device: "cpu" or "cuda".
        seconds: the time for which each of the two networks is measured per candidate.

    Attributes:
        latencies: from a threshold to the latency of its network that was measured last.
    """

    name = "speedup"

    def __init__(
        self,
        target: float,
        *,
        batch_size: int = 1,
        runtime: str = "eager",
        threads: int = 1,
        device: str = "cpu",
        seconds: float = 0.5,
    ) -> None:
        super().__init__(target)
        self.batch_size, self.runtime, self.threads = batch_size, runtime, threads
        self.device, self.seconds = device, seconds
        self.latencies: dict[float, Latency] = {}

    def measurement(self, candidates: Candidates) -> Callable[[float], float]:
        """A function from a threshold to the measured speed-up of its network."""
        return lambda level: self._speedup(candidates, level, self.seconds)

    def _speedup(self, candidates: Candidates, level: float, seconds: float) -> float:
        result = benchmark(
            candidates.dense,
            candidates.network_at(level),
            candidates.example_input,
            batch_sizes=(self.batch_size,),
            threads=(self.threads,),
            devices=(self.device,),
            runtimes=(self.runtime,),
            seconds=seconds,
        )
        (self.latencies[level],) = result.latencies
        return self.latencies[level].speedup

    def describe(self, value: float) -> str:
        """The speed-up in words."""
        return (
            f"the network is {value:.2f} times faster ({self.runtime}, batch size "
            f"{self.batch_size}, {self.device}, threads: {self.threads})"
        )

    def report(self, level: float) -> str:
        """The speed-up and its confidence interval in words."""
        latency = self.latencies[level]
        return (
            f"{self.describe(self.measured[level])}; {latency.confidence:.0%} confidence interval "
            f"{latency.interval}"
        )

    def confirm(self, candidates: Candidates, index: int) -> int:
        """The index of a level whose network meets the budget in a longer measurement.

        The levels from `index` on are tried in ascending order, in steps of 1/32 of the rest. The
        budget is met if the lower end of the confidence interval is at least the target.

        Raises:
            ValueError: there is no such level.
        """
        last = len(candidates.levels) - 1
        while True:
            level = float(candidates.levels[index])
            self.measured[level] = self._speedup(candidates, level, LONGER * self.seconds)
            low = self.latencies[level].speedup_low
            if low is not None and self.is_met(low):
                return index
            if index == last:
                raise self.refusal(candidates, level)
            index = min(last, index + max(1, (last - index) // 32))
