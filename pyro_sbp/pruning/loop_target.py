"""A target of MACs inside any training loop, whose steps are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import nn

from pyro_sbp.gates.gate import Gate
from pyro_sbp.models.gated_guide import TruncatedLogNormalGuide
from pyro_sbp.models.gated_model import GatedModel
from pyro_sbp.pruning.choosing import Choice
from pyro_sbp.pruning.costs import Costs, UnitCosts
from pyro_sbp.pruning.macs_control import UPDATE_EVERY, KLControl
from pyro_sbp.pruning.macs_target import TargetReached, check_target, choose_by_macs

__all__ = ["LoopTarget", "check_loop_target"]


def _check_ratio(ratio: float) -> None:
    """Raise ValueError unless a `target_macs_ratio` is a number >= 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not ratio >= 1:
        raise ValueError(f"target_macs_ratio is {ratio!r}; expected a number >= 1")


def check_loop_target(
    ratio: float | None, num_steps: int | None, threshold: float, costs: Costs | None
) -> None:
    """Raise ValueError unless these arguments of `Pruner` are valid together.

    Args:
        ratio: `target_macs_ratio`.
        num_steps, threshold, costs: the arguments with these names.
    """
    if ratio is None:
        if num_steps is not None:
            raise ValueError(
                f"num_steps is {num_steps}, and has no effect without a target; set "
                "target_macs_ratio, or leave num_steps out"
            )
        return
    _check_ratio(ratio)
    given = f"target_macs_ratio is {ratio:g}"
    if num_steps is None:
        raise ValueError(
            f"{given}, which needs the number of training steps with noise; set num_steps"
        )
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral) or num_steps < 1:
        raise ValueError(f"num_steps is {num_steps!r}; expected an integer >= 1")
    if not threshold > 0:
        raise ValueError(f"{given}, which needs a threshold > 0; threshold is {threshold}")
    if costs is not None:
        raise ValueError(f"{given}, which weights units by their MACs; leave costs out")


class LoopTarget:
    """A target of MACs for a training loop: the weights of the KL divergence follow its steps.

    The weights are those of `KLControl`. They are adjusted in every 20th step, and stay as they are
    after `num_steps` steps.

    Args:
        ratio: the target, as a ratio of the MACs of the dense network to those of the smaller one.
        num_steps: the number of steps of the training loop.
        net: the dense network.
        gates: its gates.
        example_input: an input of the network. MACs are counted for its shape.
        kl_scale: the weights of the KL divergence without costs, by gate.
        macs_weight, threshold: as for `KLControl`.

    Attributes:
        control: the controller of the weights.
        steps: the number of steps that were made.

    Raises:
        ValueError: the target cannot be reached.
    """

    def __init__(
        self,
        ratio: float,
        num_steps: int,
        net: nn.Module,
        gates: Sequence[Gate],
        example_input: Any,
        *,
        kl_scale: Mapping[str, float],
        macs_weight: float,
        threshold: float,
    ) -> None:
        self.ratio, self.num_steps, self.steps = float(ratio), int(num_steps), 0
        self._threshold = threshold
        self._costs = UnitCosts(net, gates, example_input)
        self._dense_macs = self._costs.expected({})
        check_target(self.ratio, net, gates, self._costs, kl_scale, example_input)
        self.control = KLControl(kl_scale, macs_weight, threshold, self._costs, self.ratio)

    def begin_step(self, model: GatedModel, guide: TruncatedLogNormalGuide) -> None:
        """Count a step, and adjust the weights of the model if it is time."""
        if self.steps < self.num_steps and self.steps % UPDATE_EVERY == 0:
            position = self.steps / self.num_steps
            model.kl_scale.update(self.control.update(self._costs, guide.snr(), position))
        self.steps += 1

    def choose(
        self,
        model: GatedModel,
        guide: TruncatedLogNormalGuide,
        example_input: Any,
        round_to: int = 1,
        min_units: int = 1,
    ) -> tuple[Choice, TargetReached]:
        """Choose the units of the network that reaches the target.

        Args:
            model, guide: the gated network and its posterior.
            example_input, round_to, min_units: as for `choose_units`.

        Raises:
            ValueError: as for `choose_units`, or no threshold gives the target.
        """
        net, gates, mean, snr = model.gated.net, model.gates, guide.mean(), guide.snr()
        return choose_by_macs(
            net,
            gates,
            mean,
            snr,
            example_input,
            self._costs,
            criterion="snr",
            ratio=self.ratio,
            threshold=self._threshold,
            dense=net,
            dense_macs=self._dense_macs,
            round_to=round_to,
            min_units=min_units,
        )

    def warning(self, reached: TargetReached) -> str:
        """One line for a posterior that is far from the target."""
        text = reached.warning(self._threshold)
        if self.steps == self.num_steps:
            return text
        return f"{text}; the loop has made {self.steps} steps, and num_steps is {self.num_steps}"

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values, for a checkpoint."""
        return {
            "ratio": self.ratio,
            "num_steps": self.num_steps,
            "steps": self.steps,
            "control": self.control.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless a state is that of the same target and number of steps."""
        saved, own = (state["ratio"], state["num_steps"]), (self.ratio, self.num_steps)
        if saved != own:
            raise ValueError(
                "the state has target_macs_ratio {:g} and num_steps {}, but the pruner has {:g} "
                "and {}; create the pruner with those of the state".format(*saved, *own)
            )

    def load_state_dict(self, state: Mapping[str, Any], model: GatedModel) -> None:
        """Load a state that `state_dict` returned, and set the weights of the model."""
        self.control.load_state_dict(state["control"])
        self.steps = state["steps"]
        model.kl_scale.update(self.control.weights)
