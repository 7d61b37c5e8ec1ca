"""The settings of methods with noise on units. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from pyro_sbp.recipes.criteria import CRITERIA, CriterionName, Rule, find_criterion
from pyro_sbp.recipes.fields import Factor, setting
from pyro_sbp.recipes.recipe import Recipe
from pyro_sbp.recipes.validation import STRICT, refusing

__all__ = ["GatedRecipe", "PriorScale"]

PriorScale = Annotated[float, Field(gt=0, le=1e6)]


@refusing
@dataclass(frozen=True, kw_only=True, config=STRICT)
class GatedRecipe(Recipe):
    """The settings of methods with noise on units."""

    macs_weight: Factor = setting(
        0.0,
        "Weight of the cost of a unit in its KL divergence. The KL of a gate is weighted by "
        "`kl_scale` * (1 + `macs_weight` * cost of one of its units / mean cost of all units).",
    )
    target_macs_ratio: Annotated[float, Field(ge=1, le=1e6)] | None = setting(
        None,
        "The ratio of the MACs of the dense network to those of the pruned network that the run "
        "shall reach. The weights of the KL divergence are adjusted during training, and "
        "`macs_weight` is their start. The units are then chosen by this ratio instead of the "
        "`threshold`. RBP needs the order `together`.",
    )
    current_costs: bool = setting(
        False,
        "Use the MACs of a unit as they are now, when other gates have lost units, instead of "
        "those in the dense network (for rbp, at the beginning of a turn). With "
        "`target_macs_ratio` they are always used.",
    )
    cost: Literal["macs", "latency"] = setting(
        "macs",
        "The cost of a unit: its MACs, or the latency that it adds on this machine, which is "
        "measured before the noise is trained.",
    )
    cost_batch_size: Annotated[int, Field(ge=1)] = setting(
        128, "The batch size at which the latency of units is measured."
    )
    noise_per: Literal["batch", "example"] = setting(
        "batch",
        "Draw theta once for a batch (`batch`), or for every example (`example`), which has less "
        "variance and takes more time.",
    )
    prior_scale: PriorScale | None = setting(
        None,
        "Scale of the prior of log theta, usually from 1.2 to 20. Its mode is the lower bound of "
        "theta. A smaller scale removes more units. Without a value the prior is the "
        "log-uniform prior of SBP.",
    )
    init_loc: Annotated[float, Field(ge=-25, le=5)] = setting(
        0.0, "Initial location of the posterior of log theta."
    )
    criterion: CriterionName = setting(
        "snr",
        "The score that decides which units are kept: their signal-to-noise ratio (`snr`), or "
        "their log Bayes factor by Bayesian model reduction (`bmrs-n`, `bmrs-u`).",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_threshold(cls, values: ArgsKwargs) -> ArgsKwargs:
        given = values.kwargs or {}
        criterion = given.get("criterion", "snr")
        if "threshold" in given or not isinstance(criterion, str) or criterion not in CRITERIA:
            return values
        return ArgsKwargs(values.args, {**given, "threshold": CRITERIA[criterion].threshold})

    @model_validator(mode="after")
    def _check_cost(self) -> Self:
        if self.cost != "macs" and not self.macs_weight:
            raise ValueError(
                f"cost is {self.cost}, and has no effect, because macs_weight is 0; set macs_weight"
            )
        if self.cost != "latency" and self.cost_batch_size != 128:
            raise ValueError(f"cost_batch_size applies to latencies only; cost is {self.cost}")
        if self.current_costs and self.cost != "macs":
            raise ValueError(f"current_costs applies to MACs only; cost is {self.cost}")
        if self.current_costs and not self.macs_weight and self.target_macs_ratio is None:
            raise ValueError(
                "current_costs has no effect, because macs_weight is 0; set macs_weight"
            )
        if self.current_costs:
            self._check_snr("current_costs is true")
        return self

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target_macs_ratio is None:
            return self
        given = f"target_macs_ratio is {self.target_macs_ratio:g}"
        if self.cost != "macs":
            raise ValueError(f"{given}, which weights units by their MACs; cost is {self.cost}")
        self._check_snr(given)
        return self

    def _check_snr(self, given: str) -> None:
        """Raise ValueError unless units are kept by their signal-to-noise ratios, which `KLControl`
        needs.

        Args:
            given: the setting that needs them, for the message.
        """
        if self.criterion == "snr" and self.threshold > 0:
            return
        name = "threshold" if self.criterion == "snr" else "criterion"
        raise ValueError(
            f"{given}, which needs signal-to-noise ratios and a threshold > 0; {name} is "
            f"{getattr(self, name)}"
        )

    @model_validator(mode="after")
    def _check_threshold(self) -> Self:
        criterion = CRITERIA[self.criterion]
        criterion.check(self.threshold)
        if self.threshold > criterion.most:
            raise ValueError(
                f"threshold is {self.threshold}; expected a number <= {criterion.most:g}, the "
                f"largest {criterion.title} that a posterior can reach"
            )
        return self

    def replace(self, **changes: Any) -> Self:
        """A copy with other values. With another criterion, the threshold is the default of that
        criterion, unless it is given.

        Raises:
            RequestError: there is no such setting, or a value is out of its bounds.
        """
        criterion = changes.get("criterion", self.criterion)
        if criterion != self.criterion:
            changes = {"threshold": find_criterion(criterion).threshold, **changes}
        return super().replace(**changes)

    def rule(self, criterion: str | None = None) -> Rule:
        """The criterion and the threshold that decide which units are kept; see `Recipe.rule`.

        Raises:
            RequestError: the criterion is unknown.
        """
        if criterion in (None, self.criterion):
            return Rule(CRITERIA[self.criterion], self.threshold)
        found = find_criterion(criterion)
        return Rule(found, found.threshold)
