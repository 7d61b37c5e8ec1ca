"""The settings that all methods have. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from pyro_sbp.errors import RequestError, did_you_mean
from pyro_sbp.recipes.criteria import CRITERIA, Rule, find_criterion
from pyro_sbp.recipes.fields import Count, Factor, Fraction, Positive, Rate, Share, setting
from pyro_sbp.recipes.validation import STRICT, refusing

__all__ = ["TEMPERATURE", "Optimizer", "Recipe", "Schedule", "setting_names"]

Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["linear", "cosine", "one-cycle"]
#: The temperature of a teacher's soft labels unless another is given; it suits MNIST.
TEMPERATURE = 4.0


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
    #: Settings in epochs, which change in proportion to the number of epochs with noise.
    proportional: ClassVar[tuple[str, ...]] = ()

    name: str = setting(
        "default", "The name of the recipe. For a recipe from a file it is the name of the file."
    )
    dense_epochs: Count = setting(
        10,
        "Epochs of ordinary training before noise is added. Noise on an untrained network may "
        "remove too much.",
    )
    epochs: Positive = setting(
        25,
        "Epochs of training with noise. The noise needs a few thousand steps to grow, so small "
        "data sets need more epochs.",
    )
    finetune_epochs: Count = setting(
        5, "Epochs of ordinary training of the pruned network. With 0 there is no fine-tuning."
    )
    batch_size: Positive = setting(128, "Examples per step. Smaller batches give more steps.")
    learning_rate: Rate = setting(
        1e-3,
        "Learning rate of the weights in the dense phase and, by default, in the phase with noise.",
    )
    gated_learning_rate: Rate | None = setting(
        None,
        "Learning rate of the weights in the phase with noise; by default `learning_rate`. In "
        "this phase the statistics of batch norms are frozen, so a network with batch norm may "
        "need a tenth of it or less.",
    )
    noise_learning_rate: Rate = setting(
        1e-2,
        "Learning rate of the posterior. With a larger one the noise grows faster, and more units "
        "are removed.",
    )
    finetune_learning_rate: Rate = setting(3e-4, "Learning rate of the pruned network.")
    optimizer: Optimizer = setting(
        "adam",
        "Optimizer of the weights: `adam`, `adamw`, or `sgd` with Nesterov momentum. The noise is "
        "always trained by Adam.",
    )
    momentum: Fraction = setting(0.9, "Momentum of `sgd`; other optimizers have none.")
    weight_decay: Share = setting(0.0, "Weight decay of the weights. The noise has none.")
    clip_gradient: Factor = setting(
        0.0,
        "Largest norm of the gradient of the weights; a larger gradient is scaled down. 0 turns "
        "clipping off.",
    )
    schedule: Schedule = setting(
        "linear",
        "Schedule of the learning rates in each phase: constant, then a linear decay to zero "
        "(`linear`); half a cosine (`cosine`); or a rise from 1/25 of the rate, then a decay to "
        "nearly zero (`one-cycle`).",
    )
    warmup: Fraction = setting(
        0.0,
        "The first share of every phase, in which learning rates rise linearly. With `one-cycle`, "
        "0 stands for 0.3. In the epochs of kl_free_epochs and kl_rising_epochs the rates are "
        "constant.",
    )
    decay: Share = setting(
        0.5,
        "The last share of every phase, after the warm-up, in which the `linear` schedule decays.",
    )
    label_smoothing: Fraction = setting(
        0.0,
        "Share of the target probability that is distributed evenly over all classes. It applies "
        "to phases without noise that learn the labels of the data.",
    )
    average: Fraction = setting(
        0.0,
        "Decay of the exponential moving average of the weights in phases without noise. The "
        "phase ends with the average. 0 turns averaging off; 0.999 averages over about 1,000 "
        "steps.",
    )
    kl_scale: float | Mapping[str, float] = setting(
        1.0,
        "Weight of the KL divergence. A larger weight removes more units. Either a number for all "
        "gates (for SparseVD, layers), or numbers by name (1 for a gate that is not named). Early "
        "layers, which have few units and many MACs, need larger weights.",
    )
    distill: Annotated[float, Field(ge=0, le=1000)] = setting(
        0.0,
        "Temperature of the soft labels for fine-tuning; 0 uses the labels of the data. The "
        "teacher is the network before its last cut, with the noise at its mean, or the dense "
        "networks of `--teacher`. 4 works well for MNIST.",
    )
    init_log_scale: Annotated[float, Field(ge=-10, le=5)] = setting(
        -5.0,
        "Initial log scale of the posterior of log theta (-5 is an SNR of 247). For SparseVD it "
        "is that of the weights.",
    )
    threshold: float = setting(
        CRITERIA["snr"].threshold,
        "Units (for SparseVD, weights) with a smaller score are removed. The score is that of "
        "`criterion`, by default the signal-to-noise ratio. The default threshold of `bmrs-n` and "
        "`bmrs-u` is 0.919. `pyro-sbp prune` can use another threshold later.",
    )
    recalibrate: bool = setting(
        False,
        "Measure the batch norm statistics of the pruned network again, and update them in "
        "fine-tuning. Otherwise they remain those of the phase with noise.",
    )
    standardize: bool = setting(
        False,
        "Subtract from every channel its mean over the training images, and divide by its standard "
        "deviation. The network then expects such inputs.",
    )
    holdout: Annotated[int, Field(ge=0)] = setting(
        0,
        "Number of training images, drawn at random, that are reserved for validation. Use them "
        "to choose a threshold or a recipe, because the test images must not be used for a "
        "choice.",
    )
    random_labels: bool = setting(
        False,
        "Draw the labels of the training images at random, to test whether a network memorises "
        "them.",
    )
    crop: Annotated[int, Field(ge=0, le=10_000)] = setting(
        0,
        "Pad training images by this many pixels, and crop them at random to their original size.",
    )
    flip: bool = setting(
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
                "distill sets the labels of fine-tuning, but finetune_epochs is 0; set "
                "finetune_epochs, or distill to 0"
            )
        return self

    def replace(self, **changes: Any) -> Self:
        """A copy with other values.

        Raises:
            RequestError: there is no such setting, or a value is out of its bounds.
        """
        return self._from({**self.to_dict(), **changes})

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
        """A copy with another number of epochs with noise, in which the `proportional` settings
        keep their share."""
        shares = {
            name: getattr(self, name) * max(epochs, 0) // self.epochs for name in self.proportional
        }
        return self.replace(epochs=epochs, **shares)

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
        try:
            return cls._from(values)
        except RequestError as error:
            raise RequestError(f"{source}: {error}") from error

    @classmethod
    def _from(cls, values: Mapping[str, Any]) -> Self:
        for name in values:
            if name not in setting_names(cls):
                raise RequestError(_no_such_setting(name, cls))
        return cls(**values)


def setting_names(cls: type[Recipe]) -> tuple[str, ...]:
    """The names of the settings of a class of recipes."""
    return tuple(field.name for field in dataclasses.fields(cls))


def _no_such_setting(name: str, cls: type[Recipe]) -> str:
    """The message for a setting that a class of recipes does not have."""
    classes = [other for other in _subclasses(Recipe) if name in setting_names(other)]
    methods = dict.fromkeys(other.method for other in classes if other.method)
    if methods:
        return f"{name!r} is a setting of {' and '.join(methods)}, not of {cls.method}"
    known = setting_names(cls)
    close = did_you_mean(name, known) or f"; the settings are {', '.join(known)}"
    return f"there is no setting {name!r}{close}"


def _subclasses(cls: type[Recipe]) -> Iterator[type[Recipe]]:
    """All subclasses, those of subclasses included."""
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
