"""Weights of the KL divergence that follow the costs of the units, and reach a target of MACs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_sbp.pruning.costs import UnitCosts, scales_by_cost

__all__ = ["UPDATE_EVERY", "KLControl", "soft_keep"]

#: The number of steps between two updates of the weights.
UPDATE_EVERY = 20
#: The exponent in `soft_keep`. With 2 and the threshold 1, `soft_keep` would be `keep_probability`,
#: in which a unit whose posterior equals the prior counts 1/10. With 6 it counts almost nothing.
SHARPNESS = 6.0
#: The ramp of the target begins when the expected MACs have fallen by the factor `BEGINS`, at the
#: latest after the share `WAITS` of training. It ends after the share `RAMP_ENDS`, while the
#: learning rates are still large enough to change the posterior.
BEGINS, WAITS, RAMP_ENDS = 1.02, 0.2, 0.7
#: The smallest length of the ramp, as a share of training.
SHORTEST = 0.1
#: The gains of the controller, from errors of the log ratio of MACs to log strength. The integral
#: and the derivative are with respect to the share of training that is done. The derivative is that
#: of the log ratio itself, smoothed over the share `SMOOTHED`. It reduces the weights before the
#: target is exceeded, because most units that were removed do not come back.
PROPORTIONAL, INTEGRAL, DERIVATIVE = 3.0, 30.0, 0.1
SMOOTHED = 0.01
#: The largest absolute value of the log strength.
LARGEST = math.log(1e4)


def soft_keep(snr: Tensor, threshold: float) -> Tensor:
    """1 / (1 + (threshold / SNR)^6): a smooth count of the units that reach a threshold.

    Args:
        snr: the signal-to-noise ratios, of any shape, in [0, inf].
        threshold: the threshold, > 0. A unit at the threshold counts 1/2.
    """
    return 1 / (1 + (threshold / snr.double()) ** SHARPNESS)


class KLControl:
    """The weights of the KL divergence of the gates, from the current costs of the units.

    The cost of a unit is the number of MACs that the network loses if it is removed now, when other
    gates have lost units already. Without a target, the weight of a gate is ``kl_scale * (1 +
    macs_weight * cost / mean cost)``.

    With a target, a proportional-integral-derivative controller adjusts the strength of these
    weights, so that the logarithm of the expected MACs falls linearly to that of the target. The
    reference begins when units begin to be removed, and reaches the target after 70 % of training.
    A strength v < 1 multiplies all weights. A strength v >= 1 multiplies all weights by sqrt(v),
    and replaces `macs_weight` m by sqrt(v) (1 + m) - 1, so that expensive units are removed first,
    but not only these. The expected MACs are those of units that remain with the probabilities of
    `soft_keep`.

    Args:
        kl_scale: the weights without costs, by gate.
        macs_weight: the weight of the costs, which is also the start of the controller.
        threshold: the signal-to-noise ratio under which units will be removed.
        costs: the costs of the units of the dense network.
        target: the target, as a ratio of the MACs of the dense network to those of the smaller one;
            None without a target.

    Attributes:
        weights: the weights of the KL divergence, by gate.
        macs_weight: the current weight of the costs.
        factor: the current factor of all weights.
        ratio: the ratio of the MACs of the dense network to the expected MACs.
        reference: the ratio that the controller aims for now; None before the ramp and without a
            target.

    Raises:
        ValueError: the MACs of no unit are known.
    """

    def __init__(
        self,
        kl_scale: Mapping[str, float],
        macs_weight: float,
        threshold: float,
        costs: UnitCosts,
        target: float | None = None,
    ) -> None:
        macs_weight = float(macs_weight)  # a NumPy number could not be loaded from a checkpoint
        self._kl_scale, self._least = dict(kl_scale), macs_weight
        self._threshold, self._target = threshold, target
        self._dense = costs.expected({})
        self._integral = self._position = self._log_ratio = self._speed = 0.0
        self._start: tuple[float, float] | None = None
        self.macs_weight, self.factor, self.ratio = macs_weight, 1.0, 1.0
        self.reference: float | None = None
        self.weights = scales_by_cost(kl_scale, costs, macs_weight)
        if target is not None:
            costs.relative()  # raises now if a controller would have nothing to weight

    def update(
        self, costs: UnitCosts, snr: Mapping[str, Tensor], position: float | None
    ) -> dict[str, float]:
        """Adjust the weights.

        Args:
            costs: the costs of the units of the current network.
            snr: by gate, the signal-to-noise ratios of the units of the current network. Gates that
                are not named keep all their units.
            position: the share of training with noise that is done, in [0, 1]. With None, the
                controller does nothing. Pass None in a part of training in which the KL divergence
                does not have its full weight.

        Returns:
            The weights of the gates that `snr` names.
        """
        keep = {name: soft_keep(value, self._threshold) for name, value in snr.items()}
        expected, relative = costs.expected_and_relative(keep)
        log_ratio = math.log(self._dense / max(expected, 1.0))
        self.ratio = math.exp(log_ratio)
        if self._target is not None and position is not None:
            self._control(log_ratio, position)
        for name in snr:
            cost = 1 + self.macs_weight * relative[name]
            self.weights[name] = self.factor * self._kl_scale[name] * cost
        return {name: self.weights[name] for name in snr}

    def _control(self, log_ratio: float, position: float) -> None:
        passed, self._position = position - self._position, position
        grown, self._log_ratio = log_ratio - self._log_ratio, log_ratio
        if passed > 0:
            self._speed += min(1.0, passed / SMOOTHED) * (grown / passed - self._speed)
        if self._start is None:
            if self.ratio < BEGINS and position < WAITS:
                return
            self._start = position, log_ratio
        assert self._target is not None
        start, first = self._start
        share = min(1.0, (position - start) / (max(RAMP_ENDS, start + SHORTEST) - start))
        reference = first + share * (math.log(self._target) - first)
        error = reference - log_ratio
        self._integral += INTEGRAL * error * passed
        self._integral = max(-LARGEST, min(LARGEST, self._integral))
        log_strength = self._integral + PROPORTIONAL * error - DERIVATIVE * self._speed
        strength = math.exp(max(-LARGEST, min(LARGEST, log_strength)))
        # Half of a log strength above 0 increases the weights of all units, so that the layers stay
        # in balance. The other half increases the weight of the costs.
        half = math.sqrt(max(1.0, strength))
        self.factor = half if strength > 1 else strength
        self.macs_weight = half * (1 + self._least) - 1
        self.reference = math.exp(reference)

    def standing(self) -> dict[str, float]:
        """The state of the controller in numbers, for the metrics of an epoch."""
        found = {"macs_ratio": self.ratio, "macs_weight": self.macs_weight}
        if self._target is not None:
            found["kl_factor"] = self.factor
        if self.reference is not None:
            found["reference"] = self.reference
        return found

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values, for a checkpoint."""
        return {
            "integral": self._integral,
            "position": self._position,
            "log_ratio": self._log_ratio,
            "speed": self._speed,
            "start": None if self._start is None else list(self._start),
            "macs_weight": self.macs_weight,
            "factor": self.factor,
            "ratio": self.ratio,
            "reference": self.reference,
            "weights": dict(self.weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned."""
        self._integral, self._position = state["integral"], state["position"]
        self._log_ratio, self._speed = state["log_ratio"], state["speed"]
        start = state["start"]
        self._start = None if start is None else (start[0], start[1])
        self.macs_weight, self.factor = state["macs_weight"], state["factor"]
        self.ratio, self.reference = state["ratio"], state["reference"]
        self.weights = dict(state["weights"])
