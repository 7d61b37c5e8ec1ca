"""The settings of training and pruning, with one class for each method. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from pyro_sbp.errors import RequestError, did_you_mean
from pyro_sbp.recipes.criteria import CRITERIA, CriterionName, Rule, find_criterion
from pyro_sbp.recipes.validation import STRICT, refusing

__all__ = [
    "METHODS",
    "ORDERS",
    "RECIPE_CLASSES",
    "TEMPERATURE",
    "GatedRecipe",
    "RBPRecipe",
    "Recipe",
    "SBPRecipe",
    "SparseVDRecipe",
    "method_settings",
]

Order = Literal["forward", "reversed", "together"]
#: The orders in which RBP can train the gates.
ORDERS: tuple[Order, ...] = get_args(Order)
Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["linear", "cosine", "one-cycle"]
_Count = Annotated[int, Field(ge=0, le=1_000_000)]
_Positive = Annotated[int, Field(ge=1, le=1_000_000)]
_Rate = Annotated[float, Field(gt=0, le=1)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Factor = Annotated[float, Field(ge=0, le=1e6)]
#: The temperature of a teacher's soft labels unless another is given; it suits MNIST.
TEMPERATURE = 4.0
#: The largest signal-to-noise ratio that the posterior of a weight can reach: that of log alpha =
#: -8.
_MAX_WEIGHT_SNR = math.exp(4)


def _setting(default: Any, description: str) -> Any:
    return Field(default, description=description)


@refusing
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """The settings that all methods have.

    The network, the data and the machine are part of the request.

    Every method has a subclass with its own settings: `SBPRecipe`, `RBPRecipe`,
    `SparseVDRecipe`. The description and the bounds of a setting are in the metadata of its field;
    `docs/recipes.md` lists them.

    Raises:
        RequestError: there is no such setting, or a value is out of its bounds.
    """

    #: The name of the method in requests.
    method: ClassVar[str] = ""
    #: The module and the class of the method.
    implementation: ClassVar[str] = ""
    #: The prefix of the names of the method's default recipes.
    prefix: ClassVar[str] = ""

    name: str = _setting(
        "default", "The name of the recipe. For a recipe from a file it is the name of the file."
    )
    dense_epochs: _Count = _setting(
        10,
        "Epochs of ordinary training before noise is added. Noise on an untrained network may "
        "remove too much.",
    )
    epochs: _Positive = _setting(
        25,
        "Epochs of training with noise. The noise needs a few thousand steps to grow, so small "
        "data sets need more epochs.",
    )
    finetune_epochs: _Count = _setting(
        5, "Epochs of ordinary training of the pruned network. With 0 there is no fine-tuning."
    )
    batch_size: _Positive = _setting(128, "Examples per step. Smaller batches give more steps.")
    learning_rate: _Rate = _setting(
        1e-3,
        "Learning rate of the weights in the dense phase and, by default, in the phase with noise.",
    )
    gated_learning_rate: _Rate | None = _setting(
        None,
        "Learning rate of the weights in the phase with noise; by default `learning_rate`. In "
        "this phase the statistics of batch norms are frozen, so a network with batch norm may "
        "need a tenth of it or less.",
    )
    noise_learning_rate: _Rate = _setting(
        1e-2,
        "Learning rate of the posterior. With a larger one the noise grows faster, and more units "
        "are removed.",
    )
    finetune_learning_rate: _Rate = _setting(3e-4, "Learning rate of the pruned network.")
    optimizer: Optimizer = _setting(
        "adam",
        "Optimizer of the weights: `adam`, `adamw`, or `sgd` with Nesterov momentum. The noise is "
        "always trained by Adam.",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = _setting(
        0.9, "Momentum of `sgd`; other optimizers have none."
    )
    weight_decay: _Share = _setting(0.0, "Weight decay of the weights. The noise has none.")
    clip_gradient: _Factor = _setting(
        0.0,
        "Largest norm of the gradient of the weights; a larger gradient is scaled down. 0 turns "
        "clipping off.",
    )
    schedule: Schedule = _setting(
        "linear",
        "Schedule of the learning rates in each phase: constant, then a linear decay to zero "
        "(`linear`); half a cosine (`cosine`); or a rise from 1/25 of the rate, then a decay to "
        "nearly zero (`one-cycle`).",
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = _setting(
        0.0,
        "The first share of every phase, in which learning rates rise linearly. With `one-cycle`, "
        "0 stands for 0.3. In the epochs of kl_free_epochs and kl_rising_epochs the rates are "
        "constant.",
    )
    decay: _Share = _setting(
        0.5,
        "The last share of every phase, after the warm-up, in which the `linear` schedule decays.",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = _setting(
        0.0,
        "Share of the target probability that is distributed evenly over all classes. It applies "
        "to phases without noise that learn the labels of the data.",
    )
    average: Annotated[float, Field(ge=0, lt=1)] = _setting(
        0.0,
        "Decay of the exponential moving average of the weights in phases without noise. The "
        "phase ends with the average. 0 turns averaging off; 0.999 averages over about 1,000 "
        "steps.",
    )
    kl_scale: float | Mapping[str, float] = _setting(
        1.0,
        "Weight of the KL divergence. A larger weight removes more units. Either a number for all "
        "gates (for SparseVD, layers), or numbers by name (1 for a gate that is not named). Early "
        "layers, which have few units and many MACs, need larger weights.",
    )
    distill: Annotated[float, Field(ge=0, le=1000)] = _setting(
        0.0,
        "Temperature of the soft labels for fine-tuning; 0 uses the labels of the data. The "
        "teacher is the network before its last cut, with the noise at its mean, or the dense "
        "networks of `--teacher`. 4 works well for MNIST.",
    )
    init_log_scale: Annotated[float, Field(ge=-10, le=5)] = _setting(
        -5.0,
        "Initial log scale of the posterior of log theta (-5 is an SNR of 247). For SparseVD it "
        "is that of the weights.",
    )
    threshold: float = _setting(
        CRITERIA["snr"].threshold,
        "Units (for SparseVD, weights) with a smaller score are removed. The score is that of "
        "`criterion`, by default the signal-to-noise ratio. The default threshold of `bmrs-n` and "
        "`bmrs-u` is 0.919. `pyro-sbp prune` can use another threshold later.",
    )
    recalibrate: bool = _setting(
        False,
        "Measure the batch norm statistics of the pruned network again, and update them in "
        "fine-tuning. Otherwise they remain those of the phase with noise.",
    )
    standardize: bool = _setting(
        False,
        "Subtract from every channel its mean over the training images, and divide by its standard "
        "deviation. The network then expects such inputs.",
    )
    holdout: Annotated[int, Field(ge=0)] = _setting(
        0,
        "Number of training images, drawn at random, that are reserved for validation. Use them "
        "to choose a threshold or a recipe, because the test images must not be used for a "
        "choice.",
    )
    random_labels: bool = _setting(
        False,
        "Draw the labels of the training images at random, to test whether a network memorises "
        "them.",
    )
    crop: Annotated[int, Field(ge=0, le=10_000)] = _setting(
        0,
        "Pad training images by this many pixels, and crop them at random to their original size.",
    )
    flip: bool = _setting(
        False,
        "Mirror training images from left to right at random. Do not use it if left and right "
        "matter, as for digits.",
    )

    @field_validator("kl_scale", mode="before")
    @classmethod
    def _check_kl_scale(cls, value: Any) -> Any:
        scales = value if isinstance(value, Mapping) else {"": value}
        for gate, scale in scales.items():
            of_gate = f" for {gate!r} {scale!r}" if gate else ""
            if isinstance(scale, bool) or not isinstance(scale, int | float):
                raise ValueError(f"expected a number, or numbers by gate{of_gate and ';'}{of_gate}")
            if not 0 <= scale <= 1e6:
                raise ValueError(f"expected numbers from 0 to 1e6{of_gate and ';'}{of_gate}")
        return value

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if not self.method:
            raise ValueError(
                "Recipe has no method; use SBPRecipe, RBPRecipe or SparseVDRecipe of "
                "pyro_sbp.recipes"
            )
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        if self.momentum != 0.9 and self.optimizer != "sgd":
            raise ValueError(f"momentum applies to sgd only; optimizer is {self.optimizer}")
        if self.decay != 0.5 and self.schedule != "linear":
            raise ValueError(
                f"decay applies to the linear schedule only; schedule is {self.schedule}"
            )
        return self

    @model_validator(mode="after")
    def _check_distill(self) -> Self:
        if self.distill and not self.finetune_epochs:
            raise ValueError(
                "distill sets the labels of fine-tuning, but finetune_epochs is 0; expected more"
            )
        return self

    def replace(self, **changes: Any) -> Self:
        """A copy with other values.

        Raises:
            RequestError: there is no such setting, or a value is out of its bounds.
        """
        for name in changes:
            if name not in method_settings(self.method):
                raise RequestError(_no_such_setting(name, type(self)))
        return type(self)(**{**self.to_dict(), **changes})

    def rule(self, criterion: str | None = None) -> Rule:
        """The criterion and the threshold that decide what is kept.

        Args:
            criterion: the name of the criterion. The default is the criterion of the recipe, with
                its threshold. Another criterion has its default threshold.

        Raises:
            RequestError: the criterion is unknown, or is not for this method.
        """
        if criterion is not None and find_criterion(criterion).name != "snr":
            raise RequestError(
                f"the criterion {criterion} is for noise on units; {self.method} has noise on "
                "weights, and removes those of a small signal-to-noise ratio"
            )
        return Rule(CRITERIA["snr"], self.threshold)

    def with_epochs(self, epochs: int) -> Self:
        """A copy with another number of epochs with noise."""
        return self.replace(epochs=epochs)

    def epochs_per_gate(self, gates: int) -> int:
        """The number of epochs in which each gate has noise."""
        return self.epochs

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Self:
        """A recipe from plain values.

        Args:
            values: from the names of settings to their values.
            source: the origin of the values, for messages.

        Raises:
            RequestError: the method has no such setting, or a value is out of its bounds.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise RequestError(f"{source}: {_no_such_setting(name, cls)}")
        try:
            return cls(**values)
        except RequestError as error:
            raise RequestError(f"{source}: {error}") from error


@refusing
@dataclass(frozen=True, kw_only=True, config=STRICT)
class GatedRecipe(Recipe):
    """The settings of methods with noise on units."""

    macs_weight: _Factor = _setting(
        0.0,
        "Weight of the cost of a unit in its KL divergence. The KL of a gate is weighted by "
        "`kl_scale` * (1 + `macs_weight` * cost of one of its units / mean cost of all units).",
    )
    target_macs_ratio: Annotated[float, Field(ge=1, le=1e6)] | None = _setting(
        None,
        "The ratio of the MACs of the dense network to those of the pruned network that the run "
        "shall reach. The weights of the KL divergence are adjusted during training, and "
        "`macs_weight` is their start. The units are then chosen by this ratio instead of the "
        "`threshold`. RBP needs the order `together`.",
    )
    current_costs: bool = _setting(
        False,
        "Use the MACs of a unit as they are now, when other gates have lost units, instead of "
        "those in the dense network (for rbp, at the beginning of a turn). With "
        "`target_macs_ratio` they are always used.",
    )
    cost: Literal["macs", "latency"] = _setting(
        "macs",
        "The cost of a unit: its MACs, or the latency that it adds on this machine, which is "
        "measured before the noise is trained.",
    )
    cost_batch_size: Annotated[int, Field(ge=1)] = _setting(
        128, "The batch size at which the latency of units is measured."
    )
    noise_per: Literal["batch", "example"] = _setting(
        "batch",
        "Draw theta once for a batch (`batch`), or for every example (`example`), which has less "
        "variance and takes more time.",
    )
    prior_scale: Annotated[float, Field(gt=0, le=1e6)] | None = _setting(
        None,
        "Scale of the prior of log theta, from 1.2 to 20. Its mode is the lower bound of theta. "
        "A smaller scale removes more units. Without a value the prior is the log-uniform prior "
        "of SBP.",
    )
    init_loc: Annotated[float, Field(ge=-25, le=5)] = _setting(
        0.0, "Initial location of the posterior of log theta."
    )
    criterion: CriterionName = _setting(
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
        if self.current_costs and self.cost != "macs":
            raise ValueError(f"current_costs applies to MACs only; cost is {self.cost}")
        if self.current_costs and not self.macs_weight and self.target_macs_ratio is None:
            raise ValueError(
                "current_costs has no effect, because macs_weight is 0; set macs_weight"
            )
        return self

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target_macs_ratio is None:
            return self
        given = f"target_macs_ratio is {self.target_macs_ratio:g}"
        if self.cost != "macs":
            raise ValueError(f"{given}, which weights units by their MACs; cost is {self.cost}")
        if self.criterion != "snr" or self.threshold <= 0:
            name, value = (
                ("threshold", self.threshold)
                if self.criterion == "snr"
                else ("criterion", self.criterion)
            )
            raise ValueError(
                f"{given}, which needs signal-to-noise ratios and a threshold > 0; {name} is "
                f"{value}"
            )
        return self

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


@refusing
@dataclass(frozen=True, kw_only=True, config=STRICT)
class _RisingKL(Recipe):
    """The settings of methods whose KL divergence may have a smaller weight at first."""

    kl_free_epochs: _Count = _setting(
        0, "Number of first epochs with noise in which the weight of the KL divergence is 0."
    )
    kl_rising_epochs: _Count = _setting(
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

    #: Settings in epochs, which change in proportion to the number of epochs with noise.
    proportional: ClassVar[tuple[str, ...]] = ("kl_free_epochs", "kl_rising_epochs")

    def with_epochs(self, epochs: int) -> Self:
        """A copy with another number of epochs with noise, in which the `proportional` settings
        keep their share."""
        shares = {
            name: getattr(self, name) * max(epochs, 0) // self.epochs for name in self.proportional
        }
        return self.replace(epochs=epochs, **shares)


@refusing
@dataclass(frozen=True, kw_only=True, config=STRICT)
class SBPRecipe(_RisingKL, GatedRecipe):
    """The settings of structured Bayesian pruning (arXiv 1705.07283)."""

    method: ClassVar[str] = "sbp"
    implementation: ClassVar[str] = "pyro_sbp.methods.sbp:SBP"
    proportional: ClassVar[tuple[str, ...]] = (*_RisingKL.proportional, "cut_every")

    cut_every: _Count = _setting(
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

    noise_learning_rate: _Rate = _setting(
        5e-2,
        "Learning rate of the posterior. It is larger than for SBP, because every gate has only "
        "its share of the epochs.",
    )
    prior_scale: Annotated[float, Field(gt=0, le=1e6)] | None = _setting(
        4.0,
        "Scale of the prior of log theta, from 1.2 to 20. Its mode is the lower bound of theta. "
        "A smaller scale removes more units. `none` is the log-uniform prior of SBP.",
    )
    order: Order = _setting(
        "forward",
        "The order of the turns of the gates: that of the data flow (`forward`), the reverse "
        "(`reversed`), or all gates in one turn (`together`).",
    )

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

    exact_kl: bool = _setting(
        False, "Use the exact KL divergence instead of the paper's approximation."
    )
    #: The signal-to-noise ratio of log alpha = 3, which is exp(-3/2) (arXiv 1701.05369, section 5).
    threshold: Annotated[float, Field(ge=0, le=_MAX_WEIGHT_SNR)] = _setting(
        math.exp(-1.5),
        "Weights with a smaller signal-to-noise ratio are set to zero. The default is that of the "
        "paper, log alpha = 3.",
    )


RECIPE_CLASSES: dict[str, type[Recipe]] = {
    cls.method: cls for cls in (SBPRecipe, SparseVDRecipe, RBPRecipe)
}
#: The module and the class of every method, by the name of the method.
METHODS = {method: cls.implementation for method, cls in RECIPE_CLASSES.items()}


def method_settings(method: str) -> tuple[str, ...]:
    """The names of the settings that a method has."""
    return tuple(field.name for field in dataclasses.fields(RECIPE_CLASSES[method]))


def _no_such_setting(name: str, cls: type[Recipe]) -> str:
    """The message for a setting that a method does not have."""
    others = [method for method in RECIPE_CLASSES if name in method_settings(method)]
    if others:
        return f"{name!r} is a setting of {' and '.join(others)}, not of {cls.method}"
    known = [field.name for field in dataclasses.fields(cls)]
    close = did_you_mean(name, known) or f"; the settings are {', '.join(known)}"
    return f"there is no setting {name!r}{close}"
