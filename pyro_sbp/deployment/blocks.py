"""Time several functions in turn, in blocks of calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from timeit import Timer
from typing import Any

from pyro_sbp.deployment.intervals import LEAST

__all__ = ["times_in_turn"]

#: The number of blocks into which the duration of a measurement is divided.
BLOCKS = 25


def times_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The time of one call of each function in seconds, averaged over each block of calls.

    In every round, each function is called for one block. The order is reversed from round to
    round, so that other load on the machine, and a clock frequency that drifts, affect all
    functions. The k-th values of two functions were measured side by side, and can be compared.

    Args:
        calls: the functions by name.
        seconds: the time for which each function is measured. There are at least six rounds.
        clock: a function that returns the time in seconds, after all work has finished.
    """
    timers = {name: Timer(function, timer=clock) for name, function in calls.items()}
    numbers = {name: _calls_per_block(timer, seconds / BLOCKS) for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, rounds, begin = list(calls), 0, clock()
    while rounds < LEAST or clock() - begin < seconds * len(calls):
        for name in names:
            times[name].append(timers[name].timeit(numbers[name]) / numbers[name])
        names.reverse()
        rounds += 1
    return times


def _calls_per_block(timer: Timer, duration: float) -> int:
    """The number of calls that take about `duration` seconds, at least 1."""
    timer.timeit(2)  # the first calls allocate memory and choose algorithms
    number = 1
    while (taken := timer.timeit(number)) < duration / 4:
        number *= 4
    return max(1, round(number * duration / taken))
