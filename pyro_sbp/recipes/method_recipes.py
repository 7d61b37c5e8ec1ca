"""The settings of each method, and the methods by name. Needs no torch."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from pyro_sbp.recipes.fields import Count, Rate, setting
from pyro_sbp.recipes.gated_recipe import GatedRecipe, PriorScale
from pyro_sbp.recipes.recipe import Recipe
from pyro_sbp.recipes.validation import STRICT, refusing

__all__ = ["METHODS", "ORDERS", "RECIPE_CLASSES", "RBPRecipe", "SBPRecipe", "SparseVDRecipe"]

Order = Literal["forward", "reversed", "together"]
#: The orders in which RBP can train the gates.
ORDERS: tuple[Order, ...] = get_args(Order)
#: The largest signal-to-noise ratio that the posterior of a weight can reach: that of log alpha =
#: -8.
_MAX_WEIGHT_SNR = math.exp(4)


@refusing
@dataclass(frozen=True, kw_only=True, config=STRICT)
class _RisingKL(Recipe):
    """The settings of methods whose KL divergence may have a smaller weight at first."""

    proportional: ClassVar[tuple[str, ...]] = ("kl_free_epochs", "kl_rising_epochs")

    kl_free_epochs: Count = setting(
        0, "Number of first epochs with noise in which the weight of the KL divergence is 0."
    )
    kl_rising_epochs: Count = setting(
        0,
        "Number of next epochs, in which the weight of the KL divergence rises linearly to its "
        "final value.",
    )

    @model_validator(mode="after")
    def _check_kl_epochs(self) -> Self:
        before = self.kl_free_epochs + self.kl_rising_epochs
        if before >= self.epochs:
            raise ValueError(
                f"epochs is {self.epochs}; expected more than kl_free_epochs and kl_rising_epochs "
                f"together, which are {before}"
            )
        return self


@refusing
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SBPRecipe(_RisingKL, GatedRecipe):
    """The settings of structured Bayesian pruning (arXiv 1705.07283)."""

    method: ClassVar[str] = "sbp"
    implementation: ClassVar[str] = "pyro_sbp.methods.sbp:SBP"
    proportional: ClassVar[tuple[str, ...]] = (*_RisingKL.proportional, "cut_every")

    cut_every: Count = setting(
        0,
        "Number of epochs with noise between cuts. A cut removes the units under half of the "
        "threshold, which makes later epochs faster. With 0, units are removed only at the end. "
        "`pyro-sbp prune` cannot restore units that were removed earlier.",
    )

    @model_validator(mode="after")
    def _check_cut_every(self) -> Self:
        full = self.epochs - self.kl_free_epochs - self.kl_rising_epochs
        if self.cut_every >= full and self.cut_every:
            raise ValueError(
                f"cut_every is {self.cut_every}; expected less than the epochs in which the KL "
                f"divergence counts in full, {full}, or 0"
            )
        return self


@refusing
@dataclass(frozen=True, kw_only=True, config=STRICT)
class RBPRecipe(GatedRecipe):
    """The settings of recursive Bayesian pruning (arXiv 1812.00353)."""

    method: ClassVar[str] = "rbp"
    implementation: ClassVar[str] = "pyro_sbp.methods.rbp:RBP"
    prefix: ClassVar[str] = "rbp-"

    noise_learning_rate: Rate = setting(
        5e-2,
        "Learning rate of the posterior. It is larger than for SBP, because every gate has only "
        "its share of the epochs.",
    )
    prior_scale: PriorScale | None = setting(
        4.0,
        "Scale of the prior of log theta, usually from 1.2 to 20. Its mode is the lower bound of "
        "theta. A smaller scale removes more units. `none` is the log-uniform prior of SBP.",
    )
    order: Order = setting(
        "forward",
        "The order of the turns of the gates: that of the data flow (`forward`), the reverse "
        "(`reversed`), or all gates in one turn (`together`).",
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.target_macs_ratio is not None and self.order != "together":
            raise ValueError(
                f"target_macs_ratio is {self.target_macs_ratio:g}, which needs noise on all gates "
                f"at once; order is {self.order}; use order together, or the method sbp"
            )
        return self

    def epochs_per_gate(self, gates: int) -> int:
        """The number of epochs in which each gate has noise; the smallest number of all gates."""
        return self.epochs if self.order == "together" else self.epochs // max(1, gates)


@refusing
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SparseVDRecipe(_RisingKL):
    """The settings of sparse variational dropout (arXiv 1701.05369)."""

    method: ClassVar[str] = "sparse-vd"
    implementation: ClassVar[str] = "pyro_sbp.methods.sparse_vd:SparseVD"
    prefix: ClassVar[str] = "sparse-"

    exact_kl: bool = setting(
        False, "Use the exact KL divergence instead of the paper's approximation."
    )
    #: The signal-to-noise ratio of log alpha = 3, which is exp(-3/2) (arXiv 1701.05369, section 5).
    threshold: Annotated[float, Field(ge=0, le=_MAX_WEIGHT_SNR)] = setting(
        math.exp(-1.5),
        "Weights with a smaller signal-to-noise ratio are set to zero. The default is that of the "
        "paper, log alpha = 3.",
    )


#: The class of the settings of every method, by the name of the method.
RECIPE_CLASSES: dict[str, type[Recipe]] = {
    cls.method: cls for cls in (SBPRecipe, SparseVDRecipe, RBPRecipe)
}
#: The module and the class of every method, by the name of the method.
METHODS = {method: cls.implementation for method, cls in RECIPE_CLASSES.items()}
