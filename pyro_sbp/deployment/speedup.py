"""A budget of latency: how many times faster than the dense network."""

from __future__ import annotations

from collections.abc import Callable

from pyro_sbp.deployment.benchmarking import Latency, benchmark
from pyro_sbp.pruning.budgets import Budget, Candidates

__all__ = ["Speedup"]


class Speedup(Budget):
    """A network that is at least `target` times faster than the dense one on this machine.

    The budget selects the largest such network. Every candidate is measured with the dense network,
    in blocks that take turns. As latencies vary, the network that is found is measured again for
    longer; while it is too slow, the next smaller candidate is tried.

    Args:
        target: the latency of the dense network over that of the smaller one.
        batch_size: examples of a call.
        runtime: "eager", "compile" or "onnxruntime", as for `benchmark`.
        threads: CPU threads of a call.
        device: "cpu" or "cuda".
        seconds: how long each of the two networks is measured for a candidate.

    Attributes:
        latencies: from threshold to the latency that was measured last.
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
        """The measured speed-up of the network of a threshold."""
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

    def confirm(self, candidates: Candidates, index: int) -> int:
        """The index of the first level from `index` on that meets the target in a long
        measurement; the last level if none does."""
        last = len(candidates.levels) - 1
        while index < last:
            level = float(candidates.levels[index])
            self.measured[level] = self._speedup(candidates, level, 4 * self.seconds)
            if self.is_met(self.measured[level]):
                break
            index += max(1, (last - index) // 32)
        return index
