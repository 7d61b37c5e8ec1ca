"""The settings of training and pruning, as values. This module needs no torch."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_sbp.errors import RequestError, did_you_mean

__all__ = ["METHODS", "ORDERS", "PRECISIONS", "THRESHOLDS", "Recipe", "read_recipe"]


#: Where the class of every method is found.
METHODS = {
    "sbp": "pyro_sbp.methods.sbp:SBP",
    "sparse-vd": "pyro_sbp.methods.sparse_vd:SparseVD",
    "rbp": "pyro_sbp.methods.rbp:RBP",
}


#: The signal-to-noise ratio of what a method keeps: of a unit; of a weight, where log alpha < 3.
THRESHOLDS = {"sbp": 1.0, "sparse-vd": math.exp(-1.5), "rbp": 1.0}


#: The settings that a method does not have, and why.
_WITHOUT = {
    "sbp": {
        "order": "all gates have their noise at once",
        "exact_kl": "its KL is exact",
    },
    "sparse-vd": {
        "order": "all weights have their noise at once",
        "prior_scale": "its prior is the log-uniform one",
        "macs_weight": "its noise is on weights, not on units",
        "noise_per": "its noise is drawn for every example",
        "init_loc": "its means are the network's weights",
    },
    "rbp": {
        "exact_kl": "its KL is exact",
        **dict.fromkeys(
            ("kl_free_epochs", "kl_rising_epochs"), "the KL of a gate counts in full in its turn"
        ),
    },
}


#: In which order RBP takes the gates.
ORDERS = ("forward", "reversed", "together")


#: Mixed: parameters are float32, the network's matrix products bfloat16.
PRECISIONS = ("32-true", "bf16-mixed", "64-true")


@dataclass(frozen=True)
class Recipe:
    """The settings of training and pruning, apart from network, data and machine.

    Attributes:
        name: what the recipe is called.
        dense_epochs: epochs of ordinary training before the noise comes in.
        epochs: epochs of training with noise; RBP shares them out among the gates.
        kl_free_epochs: the first of them, in which the KL does not count; not for RBP.
        kl_rising_epochs: the next ones, in which its weight rises linearly to its full value; not
            for RBP.
        finetune_epochs: epochs of ordinary training of the pruned network.
        batch_size: examples a step.
        learning_rate: Adam's, for weights in the dense phase, and with noise unless the next says
            otherwise.
        gated_learning_rate: Adam's, for weights while there is noise. A network with batch norm,
            whose statistics are frozen then, may want a tenth of `learning_rate`, or less.
        noise_learning_rate: Adam's, for the posterior of the noise.
        finetune_learning_rate: Adam's, for the pruned network.
        weight_decay: on the weights, never on the noise.
        decay: the last share of every phase, over which learning rates fall linearly to zero.
        kl_scale: the weight of the KL, for all gates or by gate name (then 1 where not named); of
            SparseVD, for layers.
        macs_weight: a unit's KL counts more by this times what it costs: the weight of a gate's KL
            is its `kl_scale` times 1 + macs_weight * MACs of one of its units / mean of all units.
            Not for SparseVD, whose noise is on weights.
        exact_kl: for SparseVD only, take the exact KL and not the paper's approximation.
        noise_per: "batch" or "example": for what theta is drawn, as for `GatedModel`. Not
            for SparseVD, which draws its noise for every example, in the layers' outputs.
        prior_scale: the scale of the prior of log theta, which leans to zero: the smaller, the
            nearer to a point mass there. None for the log-uniform prior. Not for SparseVD.
        order: for RBP only, in which order it takes the gates: "forward" as data flow,
            "reversed", or "together", all in one phase.
        distill: fine-tuning learns the soft labels, at this temperature, of the network before its
            last cut with the noise at its mean; 0 for the labels of the data.
        init_loc: initial location of log theta; not for SparseVD.
        init_log_scale: initial log scale of log theta; of SparseVD, of every weight.
        threshold: units, of SparseVD weights, with a signal-to-noise ratio under it are removed; by
            default that of the method, in `THRESHOLDS`.
        recalibrate: measure the batch norm statistics of the pruned network anew, and let them
            move in fine-tuning. Otherwise they stay those that the noise was trained with.
        standardize: take from every channel its mean over the training images, and divide by its
            standard deviation.
        holdout: so many training images, drawn at random, are not trained on: errors of theirs are
            for choices, a threshold or a recipe, which the test images must not decide.
        random_labels: draw the labels of training images at random, to see what memorises them.
        crop: pad training images by so many zero pixels, and cut back at a random offset each.
        flip: mirror training images left and right at random.

    Raises:
        RequestError: a value is out of its range.
    """

    name: str = "default"
    dense_epochs: int = 10
    epochs: int = 25
    kl_free_epochs: int = 0
    kl_rising_epochs: int = 0
    finetune_epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 1e-3
    gated_learning_rate: float | None = None
    noise_learning_rate: float = 1e-2
    finetune_learning_rate: float = 3e-4
    weight_decay: float = 0.0
    decay: float = 0.5
    kl_scale: float | Mapping[str, float] = 1.0
    macs_weight: float = 0.0
    exact_kl: bool = False
    noise_per: str = "batch"
    prior_scale: float | None = None
    order: str = "forward"
    distill: float = 0.0
    init_loc: float = 0.0
    init_log_scale: float = -5.0
    threshold: float | None = None
    recalibrate: bool = False
    standardize: bool = False
    holdout: int = 0
    random_labels: bool = False
    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        for name in (
            *("dense_epochs", "kl_free_epochs", "kl_rising_epochs", "finetune_epochs"),
            *("holdout", "crop"),
        ):
            self._number(name, int, 0)
        for name in ("epochs", "batch_size"):
            self._number(name, int, 1)
        for name in ("learning_rate", "noise_learning_rate", "finetune_learning_rate"):
            self._number(name, float, 0, above=True, most=1)
        for name in ("weight_decay", "macs_weight", "distill"):
            self._number(name, float, 0)
        self._number("decay", float, 0, most=1)
        if self.threshold is not None:
            self._number("threshold", float, 0)
        if self.prior_scale is not None:
            self._number("prior_scale", float, 0, above=True, most=1e6)
        if self.gated_learning_rate is not None:
            self._number("gated_learning_rate", float, 0, above=True, most=1)
        self._number("init_loc", float, -25, most=5)
        self._number("init_log_scale", float, -10, most=5)
        scales = self.kl_scale if isinstance(self.kl_scale, Mapping) else {"": self.kl_scale}
        for gate, value in scales.items():
            what = f"kl_scale {gate}".strip()
            if isinstance(value, bool) or not isinstance(value, int | float):
                by_gate = "" if gate else ", or numbers by gate"
                raise RequestError(f"{what} is {value!r}; expected a number{by_gate}")
            if not 0 <= value < float("inf"):
                raise RequestError(f"{what} is {value}; expected a number >= 0")
        before = self.kl_free_epochs + self.kl_rising_epochs
        if before >= self.epochs:
            raise RequestError(
                f"epochs is {self.epochs}; expected more than kl_free_epochs and kl_rising_epochs "
                f"together, which are {before}"
            )
        if self.distill and not self.finetune_epochs:
            raise RequestError("distill is of fine-tuning, but finetune_epochs is 0; expected more")
        for name in ("recalibrate", "standardize", "flip", "exact_kl", "random_labels"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; expected true or false")
        if self.order not in ORDERS:
            raise RequestError(f"order is {self.order!r}; expected {', '.join(ORDERS)}")
        if self.noise_per not in ("batch", "example"):
            raise RequestError(f"noise_per is {self.noise_per!r}; expected 'batch' or 'example'")

    def _number(
        self, name: str, kind: type, least: float, above: bool = False, most: float = float("inf")
    ) -> None:
        value = getattr(self, name)
        allowed = (int, float) if kind is float else int
        ok = isinstance(value, allowed) and not isinstance(value, bool)
        ok = ok and (value > least if above else value >= least) and value <= most
        if not ok or value == float("inf"):
            bound = f"{'>' if above else '>='} {least}"
            bound += f" and <= {most}" if most < float("inf") else ""
            noun = "a number" if kind is float else "an integer"
            raise RequestError(f"{name} is {value!r}; expected {noun} {bound}")

    def replace(self, **changes: Any) -> Recipe:
        """A copy with other values; a change to None is left out."""
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})

    def with_epochs(self, epochs: int | None) -> Recipe:
        """A copy of so many epochs with noise, of which those before the KL counts in full have the
        share that they had; the same if none are given."""
        if epochs is None:
            return self
        shares = {
            name: getattr(self, name) * max(epochs, 0) // self.epochs
            for name in ("kl_free_epochs", "kl_rising_epochs")
        }
        return self.replace(epochs=epochs, **shares)

    def for_method(self, method: str) -> Recipe:
        """A copy in which what a method has a default for is set."""
        return self.replace(
            threshold=THRESHOLDS[method] if self.threshold is None else self.threshold
        )

    def check_method(self, method: str) -> None:
        """Refuse what a method does not have.

        Raises:
            RequestError: the recipe sets it, to another value than by default.
        """
        for field in dataclasses.fields(self):
            why = _WITHOUT[method].get(field.name)
            if why and getattr(self, field.name) != field.default:
                raise RequestError(f"{method} has no {field.name}: {why}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Recipe:
        """A recipe from plain values; `source` says in an error where they come from."""
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in fields:
                close = did_you_mean(name, fields) or f"; a recipe has {', '.join(fields)}"
                raise RequestError(f"{source} sets {name!r}, which no recipe has{close}")
        try:
            return cls(**values)
        except RequestError as error:
            raise RequestError(f"{source}: {error}") from error


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML file; what it does not set has its default.

    Raises:
        RequestError: the file cannot be read, is no TOML, or sets something wrong.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the recipe {path} is no TOML: {error}") from error
    return Recipe.from_dict({"name": path.stem, **values}, str(path))
