"""The confidence interval of a median."""

import random

import pytest
from scipy.stats import binom

from pyro_sbp.deployment.intervals import median_interval


@pytest.mark.parametrize(
    ("count", "rank"),
    # By hand: the largest k such that 2 P(B(n, 1/2) < k) is at most 5 %.
    [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (20, 6), (25, 8), (30, 10), (100, 40)],
)
def test_the_ranks_are_those_of_the_sign_test(count, rank):
    values = [10.0 * place for place in range(1, count + 1)]
    random.Random(count).shuffle(values)
    assert median_interval(values) == (10.0 * rank, 10.0 * (count + 1 - rank))


@pytest.mark.parametrize("count", range(6, 60))
def test_the_coverage_is_at_least_95_percent_and_that_of_the_next_rank_is_not(count):
    low, high = median_interval([float(place) for place in range(1, count + 1)])
    rank = int(low)
    assert high == count + 1 - rank
    assert 1 - 2 * binom.cdf(rank - 1, count, 0.5) >= 0.95
    assert 1 - 2 * binom.cdf(rank, count, 0.5) < 0.95


def test_it_contains_the_median_of_a_skewed_distribution_as_often_as_promised():
    draws, true = random.Random(0), 2.0**0.5
    inside = 0
    for _ in range(2_000):
        # Pareto with shape 2: the median is the square root of 2, and the variance is infinite.
        low, high = median_interval([draws.paretovariate(2.0) for _ in range(25)])
        inside += low <= true <= high
    # The exact coverage is 95.67 %; four standard errors of 2,000 draws are 1.8 points.
    assert inside / 2_000 == pytest.approx(0.9567, abs=0.018)


def test_fewer_than_six_values_are_refused():
    with pytest.raises(ValueError, match="5 values have no 95% interval of their median"):
        median_interval([1.0, 2.0, 3.0, 4.0, 5.0])
