"""The criteria that decide which units are kept: their names and the scales of their scores.

This module needs no torch; `pyro_sbp.pruning.criteria` computes the scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from pyro_sbp.errors import RequestError, unknown

__all__ = ["BMRS_THRESHOLD", "CRITERIA", "Criterion", "CriterionName", "Rule", "find_criterion"]

CriterionName = Literal["snr", "bmrs-n", "bmrs-u"]
#: 1/2 log(2 pi), the offset of the code that was published with BMRS (arXiv 2406.01345).
BMRS_THRESHOLD = 0.919


@dataclass(frozen=True)
class Criterion:
    """A criterion and the scale of its scores. Units whose score is at least the threshold are
    kept.

    Attributes:
        name: the name in requests.
        title: the name of the score in sentences.
        short: the name of the score in the heads of tables.
        threshold: the default threshold.
        least: the smallest threshold that is allowed.
        most: the largest score that a posterior can reach.
        ranks: whether a unit with a higher score is better, which a budget requires.
        sweep: the thresholds of a sweep, as multiples of the default threshold.
    """

    name: CriterionName
    title: str
    short: str
    threshold: float
    least: float
    most: float
    ranks: bool
    sweep: tuple[float, ...]

    def check(self, threshold: float) -> None:
        """Raise ValueError unless this is a valid threshold."""
        if not math.isfinite(threshold) or threshold < self.least:
            expected = f" >= {self.least:g}" if math.isfinite(self.least) else " that is finite"
            raise ValueError(f"threshold is {threshold}; expected a {self.title}{expected}")

    def check_budget(self) -> None:
        """Raise RequestError unless a budget can use this criterion."""
        if not self.ranks:
            others = " or ".join(c.name for c in CRITERIA.values() if c.ranks)
            raise RequestError(
                f"a budget needs a ranking of the units, which {self.name} does not give; "
                f"use the criterion {others}"
            )


class Rule(NamedTuple):
    """The rule that decides what is kept: units, or weights, whose score is at least the
    threshold.
    """

    criterion: Criterion
    threshold: float


#: Multiples of the default threshold, from keeping all units to removing nearly all. The range is
#: wide, because the score of a unit grows with the square of its signal-to-noise ratio.
_BMRS_SWEEP = (-20.0, 0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4)

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "snr", "signal-to-noise ratio", "SNR", 1.0, 0.0,
            math.exp(10),  # that of a unit whose log scale is -10
            True, (0.0, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0),
        ),
        Criterion(
            "bmrs-n", "log Bayes factor of BMRS_N", "-dF_N", BMRS_THRESHOLD, -math.inf, math.inf,
            True, _BMRS_SWEEP,
        ),
        Criterion(
            "bmrs-u", "log Bayes factor of BMRS_U", "-dF_U", BMRS_THRESHOLD, -math.inf, math.inf,
            False, _BMRS_SWEEP,
        ),
    )
}  # fmt: skip
assert tuple(CRITERIA) == get_args(CriterionName)


def find_criterion(name: str) -> Criterion:
    """The criterion with a name.

    Raises:
        RequestError: the criterion is unknown.
    """
    if not isinstance(name, str) or name not in CRITERIA:  # a setting may have any type
        raise RequestError(unknown("criterion", str(name), CRITERIA))
    return CRITERIA[name]
