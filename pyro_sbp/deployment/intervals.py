"""A confidence interval of a median that assumes no distribution."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

__all__ = ["CONFIDENCE", "LEAST", "median_interval"]

#: The confidence level of the intervals. The true level is at least this.
CONFIDENCE = 0.95
#: The smallest number of values that have an interval at this level.
LEAST = 6


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval between two order statistics that contains the median with a probability of at
    least `CONFIDENCE`.

    Of n independent values, the number below the median has the binomial distribution B(n, 1/2),
    whatever the distribution of the values. The k-th smallest and the k-th largest value therefore
    enclose the median with the probability 1 - 2 P(B(n, 1/2) < k), or more if values are equal. The
    largest such k is used (David and Nagaraja, Order Statistics, 2003, section 7.1).

    Args:
        values: at least six independent values.

    Raises:
        ValueError: there are fewer values than six.
    """
    count = len(values)
    if count < LEAST:
        raise ValueError(
            f"{count} values have no {CONFIDENCE:.0%} interval of their median; at least {LEAST} "
            "are needed"
        )
    rank, outside = 0, 2 / 2**count
    while outside <= 1 - CONFIDENCE:
        rank += 1
        outside += 2 * comb(count, rank) / 2**count
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]
