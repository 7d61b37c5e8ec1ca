"""The interface between training in phases and its checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pyro_sbp.gates.gate import Gate
from pyro_sbp.methods.phase import Phase

__all__ = ["PhasedTraining"]


class PhasedTraining(ABC):
    """Phases of training, and the state that is not part of the modules of the phases.

    Attributes:
        net: the network, which is trained in place.
        small: the smaller network, after the last phase with noise.
        gates: the gates of the network.
        not_prunable: the layers that are not prunable, and why.
    """

    net: nn.Module
    small: nn.Module
    gates: Iterable[Gate] = ()
    not_prunable: dict[str, str]

    @abstractmethod
    def phases(self) -> Iterator[Phase]:
        """The phases, in order. Each phase is created when it begins, from the results of the
        earlier phases.
        """

    @abstractmethod
    def posteriors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The location and the scale of the posterior of every site that has had noise, for all its
        elements: of log theta of the units, or of the weights. The tensors may share memory with
        the trained parameters. Empty without noise.
        """

    def state(self) -> dict[str, Any] | None:
        """The state that training changes besides the modules of the phases, as plain values; None
        if there is none."""
        return None

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Load a state that `state` returned. Call it before the phases begin.

        Raises:
            ValueError: this training has no state.
        """
        if state is not None:
            raise ValueError(f"{type(self).__name__} has no state; expected None")
