"""Time several functions in turn, in blocks of calls."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from timeit import Timer
from typing import Any

from pyro_sbp.deployment.intervals import LEAST

__all__ = ["ratios", "times_in_turn"]

#: The duration of a block in seconds. It is shorter than the time slices of the operating system,
#: so that most blocks are not interrupted by other processes.
BLOCK = 0.5e-3
#: The largest number of groups of consecutive blocks.
GROUPS = 25


def times_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    block: float = BLOCK,
) -> dict[str, list[float]]:
    """The time of one call of each function in seconds, averaged over each block of calls.

    In every round, each function is called for one block, or once if a call takes longer. Other
    load on the machine, and a clock frequency that drifts, therefore affect all functions. The
    order of a round is drawn at random, because in a fixed order the time slices of the operating
    system could end in the blocks of the same function again and again. The k-th values of two
    functions were measured side by side, and can be compared.

    Args:
        calls: the functions by name.
        seconds: the time for which each function is measured. There are at least six rounds.
        clock: a function that returns the time in seconds, after all work has finished.
        block: the duration of a block in seconds.
    """
    timers = {name: Timer(function, timer=clock) for name, function in calls.items()}
    numbers = {
        name: _calls_per_block(timer, min(block, seconds / LEAST)) for name, timer in timers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, order, rounds, begin = list(calls), random.Random(0), 0, clock()
    while rounds < LEAST or clock() - begin < seconds * len(calls):
        order.shuffle(names)
        for name in names:
            times[name].append(timers[name].timeit(numbers[name]) / numbers[name])
        rounds += 1
    return times


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """The ratios of the median times of two functions, in groups of consecutive rounds.

    The times of consecutive blocks depend on each other, because the load of the machine changes
    slowly. The medians of groups are nearly independent if a group lasts longer than such a change.

    Args:
        first, second: times from `times_in_turn`, of the same rounds.

    Returns:
        One ratio for each of 25 groups, whose sizes differ by at most one round. With fewer than 25
        rounds, one ratio for each round.
    """
    count = min(GROUPS, len(first))
    edges = [len(first) * place // count for place in range(count + 1)]
    spans = [slice(*pair) for pair in pairwise(edges)]
    return [median(first[span]) / median(second[span]) for span in spans]


def _calls_per_block(timer: Timer, duration: float) -> int:
    """The number of calls that take about `duration` seconds, at least 1."""
    timer.timeit(2)  # the first calls allocate memory and choose algorithms
    number = 1
    while (taken := timer.timeit(number)) < duration / 4:
        number *= 4
    return max(1, round(number * duration / taken))
