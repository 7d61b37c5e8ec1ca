"""The options of `pyro-sbp prune`."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_sbp.errors import RequestError
from pyro_sbp.text_tables import shortest

__all__ = ["Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `pyro-sbp prune` that decide which network is returned, as click passes them.

    Raises:
        RequestError: options contradict each other, or there are none.
    """

    criterion: str | None
    threshold: float | None
    macs_ratio: float | None
    parameters_ratio: float | None
    speedup: float | None
    batch_size: int | None
    runtime: str | None
    max_error_increase: float | None
    round_to: int | str
    min_units: int
    finetune_epochs: int
    distill: float | None

    def __post_init__(self) -> None:
        given = self.given()
        if len(given) > 1:
            names = ", ".join(f"--{name}" for name in given)
            raise RequestError(f"give one of {names}, not several")
        if self.speedup is None and (self.batch_size is not None or self.runtime is not None):
            option = "--batch-size" if self.batch_size is not None else "--runtime"
            raise RequestError(f"{option} applies to --speedup only")
        if self.distill is not None and not self.finetune_epochs:
            raise RequestError("--distill applies to --finetune-epochs only")
        others = (self.criterion, self.round_to, self.min_units, self.finetune_epochs)
        if not given and others == (None, 1, 1, 0):
            options = ", ".join(f"--{name}" for name in self._amounts())
            raise RequestError(
                f"give {options}, --criterion, --round-to, --min-units or --finetune-epochs"
            )

    def _amounts(self) -> dict[str, float | None]:
        """The options that set how much is removed; at most one is given."""
        return {
            "threshold": self.threshold,
            "macs-ratio": self.macs_ratio,
            "parameters-ratio": self.parameters_ratio,
            "speedup": self.speedup,
            "max-error-increase": self.max_error_increase,
        }

    def given(self) -> dict[str, float]:
        """The option that sets how much is removed, by its name; empty if none is given."""
        return {name: value for name, value in self._amounts().items() if value is not None}

    @property
    def by_threshold(self) -> bool:
        """Whether units are kept by a threshold (a given one, or that of the criterion) and not by
        a budget."""
        return self.threshold is not None or not self.given()

    def directory_name(self) -> str:
        """The name of the directory of the network, which contains all options that are given."""
        name = "pruned" if self.criterion is None else f"pruned-{self.criterion}"
        for option, value in self.given().items():
            name += f"-{option.removesuffix('-ratio')}-{shortest(value)}"
        if self.speedup is not None:
            name += f"-batch-{self.batch_size or 1}-{self.runtime or 'eager'}"
        name += f"-round-{self.round_to}" if self.round_to != 1 else ""
        name += f"-min-{self.min_units}" if self.min_units != 1 else ""
        name += f"-finetuned-{self.finetune_epochs}" if self.finetune_epochs else ""
        return name + (f"-distill-{shortest(self.distill)}" if self.distill is not None else "")
