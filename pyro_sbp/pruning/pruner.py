"""Structured Bayesian pruning inside any training loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_sbp.gates.gated_network import gating
from pyro_sbp.gates.nested import map_tensors
from pyro_sbp.gates.noise import check_no_noise, has_noise, noise_hook
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.units import units_of
from pyro_sbp.models.elbo import ClosedFormELBO
from pyro_sbp.models.gated_guide import TruncatedLogNormalGuide
from pyro_sbp.models.gated_model import GatedModel
from pyro_sbp.models.sites import scales_of
from pyro_sbp.models.untraced import untraced_kl
from pyro_sbp.pruning.choosing import check_threshold
from pyro_sbp.pruning.costs import Costs, UnitCosts, scales_by_cost
from pyro_sbp.pruning.loop_target import LoopTarget, check_loop_target
from pyro_sbp.pruning.macs_control import KLControl
from pyro_sbp.pruning.macs_target import TargetReached
from pyro_sbp.pruning.pruning import prune, shrink_to
from pyro_sbp.reasons import MOST, lines_not_prunable

__all__ = ["CHOOSING", "Pruner", "without_defaults"]

#: The key of the state of a target in `Pruner.state_dict`.
_TARGET = "macs_target"


#: The arguments of `prune` that choose the units in another way than a target.
CHOOSING = frozenset({"threshold", "criterion", "macs_ratio", "parameters_ratio", "budget"})


def without_defaults(what: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `prune` without those that change nothing: a value of None in `CHOOSING`,
    and the criterion of a pruner."""
    return {
        name: value
        for name, value in what.items()
        if name not in CHOOSING or not (value is None or (name, value) == ("criterion", "snr"))
    }


class Pruner:
    """Structured Bayesian pruning of a network inside your own training loop.

    After `attach`, the network has noise on its units whenever it is called in training mode, so a
    training loop only needs to add `kl_loss` to its loss and to optimize `parameters`. In
    evaluation mode, the network computes the same function as the network that `prune` returns with
    its default settings. With a target, it computes the function of the network that the threshold
    alone gives, which can differ from that of `prune`.
    `prune` returns the smaller network. While the pruner is attached, `pyro_sbp.save` and
    `pyro_sbp.export` raise an error for the network, because their files would have no noise.

    The model is a `GatedModel` and the posterior a `TruncatedLogNormalGuide` (Neklyudov et al.
    2017, arXiv 1705.07283). With noise, batch norms use their running statistics and do not update
    them. The `repr` of a pruner names the layers that are not prunable, with their reasons.

    With `target_macs_ratio`, the weights of the KL divergence are adjusted during training, so that
    the network of `prune` has this ratio of MACs. The units whose signal-to-noise ratio reaches the
    threshold then have almost the same ratio. A step is one call of `kl_loss` or `loss` with
    gradients enabled. After `num_steps` steps, the weights do not change any more.

    Args:
        net: the network, which should be trained already. Its parameters are shared, not copied.
        example_input: an input of the network, as for `find_gates`.
        num_data: the number of training examples.
        input_features, ignore: as for `find_gates`.
        kl_scale: the weight of the KL divergence of every gate, or of each by name. A larger one
            removes more units.
        macs_weight: the weight of the MACs of a unit in its KL divergence, as in
            `pyro_sbp.pruning.costs.scales_by_cost`.
        costs: the costs of the units for `macs_weight`; by default their MACs. Another choice is
            their measured latency (`measure_unit_latency`).
        target_macs_ratio: the ratio of the MACs of the network to those of the pruned network that
            training shall reach. `macs_weight` is then the start of its weight.
        num_steps: the number of steps that the training loop will make with noise, for a target.
            If gradients are accumulated, every call of `kl_loss` or `loss` is a step.
        noise_per: "batch" draws the noise once for a minibatch, "example" for every example.
        noise_learning_rate: the learning rate of the posterior in `parameters`.
        threshold: the signal-to-noise ratio under which a unit counts as removed in `units`, in
            evaluation mode and for a target.
        init_log_scale: the initial log scale of the posterior; -5 is a signal-to-noise ratio of
            247.

    Attributes:
        net: the network.
        gates: its gates, with ``gates.not_prunable`` for the layers that are not prunable.
        model, guide: the Pyro model and its posterior, for Pyro's own tools.
        target: how close the posterior was to the target when `prune` chose the units by it; None
            before, or if they were chosen in another way.

    Raises:
        ValueError: no layer is prunable, an argument is out of range, the target cannot be reached,
            or another pruner is attached to the network.
    """

    def __init__(
        self,
        net: nn.Module,
        example_input: Any,
        num_data: int,
        *,
        input_features: Sequence[str] = (),
        ignore: Sequence[str] = (),
        kl_scale: float | Mapping[str, float] = 1.0,
        macs_weight: float = 0.0,
        costs: Costs | None = None,
        target_macs_ratio: float | None = None,
        num_steps: int | None = None,
        noise_per: Literal["batch", "example"] = "batch",
        noise_learning_rate: float = 1e-2,
        threshold: float = 1.0,
        init_log_scale: float = -5.0,
    ) -> None:
        check_threshold(threshold)
        check_loop_target(target_macs_ratio, num_steps, threshold, costs)
        if not macs_weight >= 0:
            raise ValueError(f"macs_weight is {macs_weight}; expected a number >= 0")
        if costs is not None and not macs_weight:
            raise ValueError("costs has no effect, because macs_weight is 0; set macs_weight")
        self.net, self.example_input = net, example_input
        self.noise_learning_rate, self.threshold = noise_learning_rate, threshold
        self.gates = find_gates(net, example_input, input_features, ignore=ignore)
        if not self.gates:
            raise ValueError(
                f"no layer of {type(net).__name__} is prunable: {self.gates.reasons()}"
            )
        scales = scales_of([gate.name for gate in self.gates], kl_scale)
        self._loop_target: LoopTarget | None = None
        self.target: TargetReached | None = None
        if target_macs_ratio is not None and num_steps is not None:
            self._loop_target = LoopTarget(
                target_macs_ratio,
                num_steps,
                net,
                self.gates,
                example_input,
                kl_scale=scales,
                macs_weight=macs_weight,
                threshold=threshold,
            )
            scales = self._loop_target.control.weights
        elif macs_weight:
            costs = UnitCosts(net, self.gates, example_input) if costs is None else costs
            scales = scales_by_cost(scales, costs, macs_weight)
        self.model = GatedModel(net, self.gates, num_data, noise_per=noise_per, kl_scale=scales)
        self.guide = TruncatedLogNormalGuide(self.model, init_log_scale=init_log_scale)
        self.guide.to(next(net.parameters()).device)
        self._elbo = ClosedFormELBO()
        self._hooks: list[Any] = []
        self._contexts: list[AbstractContextManager[None]] = []
        #: The number of calls of the network with noise.
        self.noisy_calls = 0

    def __repr__(self) -> str:
        """The numbers of gates and units, and the layers that are not prunable with their reasons
        and shares of the parameters, those with most parameters first.
        """
        kept, total = sum(self.units().values()), sum(gate.size for gate in self.gates)
        shares = {name: (share,) for name, share in self.gates.shares.items()}
        gates = "gate" if len(self.gates) == 1 else "gates"
        reasons, where = self.gates.not_prunable, "gates.not_prunable"
        lines = [
            f"{type(self.net).__name__}: {len(self.gates)} {gates}, {kept} of {total} units reach "
            f"the threshold {self.threshold:g}",
            *lines_not_prunable(reasons, shares, MOST, where),
        ]
        return "\n".join(["Pruner(", *(f"  {line}" for line in lines), ")"])

    @property
    def control(self) -> KLControl | None:
        """The controller of the weights of the KL divergence, whose `standing` has its numbers for
        a log. None without a target.
        """
        return None if self._loop_target is None else self._loop_target.control

    @property
    def num_steps(self) -> int | None:
        """The number of steps of a target. None without a target."""
        return None if self._loop_target is None else self._loop_target.num_steps

    @property
    def attached(self) -> bool:
        """Whether the noise is on the network."""
        return bool(self._hooks)

    def parameters(self, **of_weights: Any) -> list[dict[str, Any]]:
        """The parameter groups for an optimizer of `torch.optim`: the weights, then the posterior.

        Args:
            of_weights: options for the group of the weights, such as ``lr`` and ``weight_decay``.
        """
        return [{"params": list(self.net.parameters()), **of_weights}, self.noise_group()]

    def noise_group(self) -> dict[str, Any]:
        """The parameter group of the posterior, without weight decay."""
        return {
            "params": list(self.guide.parameters()),
            "lr": self.noise_learning_rate,
            "weight_decay": 0.0,
        }

    def loss(self, x: Any, y: Tensor) -> Tensor:
        """The negative ELBO of a minibatch for classification, in nats per example.

        It is the cross-entropy under noise plus `kl_loss`. Use it in place of your own loss,
        without `attach`.

        Args:
            x: the input of the network, with the batch in dimension 0.
            y: labels ``[batch]``.

        Raises:
            ValueError: the pruner is attached, so the network would have noise twice.
        """
        check_no_noise(self.net, "called with theta")
        self._begin_step()
        with self._frozen():
            parts = self._elbo.parts(self.model, self.guide, x, y)
        return parts.loss / self.model.num_data

    def kl_loss(self) -> Tensor:
        """The weighted KL divergence divided by the number of training examples, to be added to a
        mean loss per example. It is a scalar in nats, with gradients for the posterior only.

        Raises:
            RuntimeError: the noise is not attached, so it would be trained by this term alone.
        """
        if not self.attached:
            raise RuntimeError(
                "the noise is not attached to the network: call attach() before the training, or "
                "minimise loss(x, y), which needs neither attach() nor kl_loss()"
            )
        self._begin_step()
        kl = untraced_kl(self.model, self.guide)
        return (self._traced_kl() if kl is None else kl) / self.model.num_data

    def _begin_step(self) -> None:
        if self._loop_target is not None and torch.is_grad_enabled():
            self._loop_target.begin_step(self.model, self.guide)

    def _traced_kl(self) -> Tensor:
        """The weighted KL divergence, computed by Pyro. It is needed if the model or the guide was
        changed, or inside an effect handler.
        """
        model = self.model

        def sites(x: Any) -> None:
            model.sample_sites(model.prior, x)

        # With noise for every example, the divergence does not depend on the batch size.
        return self._elbo.parts(sites, self.guide, self.example_input).kl

    def attach(self) -> Pruner:
        """Put noise on the units in every call of the network. Returns the pruner.

        Raises:
            RuntimeError: this or another pruner is attached already, or the network recomputes
                activations in the backward pass (gradient checkpointing), where the noise would be
                missing.
        """
        if self._hooks:
            raise RuntimeError("the pruner is attached already")
        if has_noise(self.net):
            raise RuntimeError("another pruner is attached to the network; call its detach() first")
        if any(getattr(m, "gradient_checkpointing", False) for m in self.net.modules()):
            raise RuntimeError(
                "the network recomputes activations in the backward pass, where the noise is "
                "missing; turn gradient checkpointing off"
            )
        self._hooks = [
            self.net.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.net.register_forward_hook(self._end, always_call=True),
        ]
        return self

    def detach(self) -> None:
        """Remove the noise from the network. Does nothing if the pruner is not attached."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def average_gradients(self) -> None:
        """Average the gradients of the posterior over the processes of `torch.distributed`.

        Call it before every step of the optimizer in distributed training, because
        `DistributedDataParallel` averages only the gradients of the network. Without a process
        group it does nothing.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        for parameter in self.guide.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def to(self, device: str | torch.device) -> Pruner:
        """Move the posterior and the example input to a device, which must be that of the network.
        Returns the pruner.
        """
        self.guide.to(device)
        self.example_input = map_tensors(lambda x: x.to(device), self.example_input)
        return self

    def units(self) -> dict[str, int]:
        """By gate, the number of units whose signal-to-noise ratio reaches the threshold.

        `prune` keeps at least one unit of every gate.
        """
        return {name: int((snr >= self.threshold).sum()) for name, snr in self.guide.snr().items()}

    def prune(self, **what: Any) -> nn.Module:
        """Detach the noise, and return the smaller network. The original network is not changed.

        If no unit was removed, or if the posterior is far from the target, a `UserWarning` is
        given. If an error is raised, the noise remains attached.

        Args:
            what: keyword arguments of `pyro_sbp.prune`, such as ``macs_ratio=2``. Without a
                threshold, another criterion or a budget, the units are chosen by the target, as in
                ``pyro-sbp train --target-macs-ratio``. Without a target, those that reach the
                threshold of the pruner are kept. Another ``criterion`` has its own default
                threshold.

        Raises:
            ValueError, EquivalenceError: as for `pyro_sbp.prune`.
        """
        what = without_defaults(what)
        budgets = {"macs_ratio", "parameters_ratio", "budget"}
        by_default = not CHOOSING & what.keys()
        loop_target = self._loop_target if by_default else None
        if by_default and loop_target is None:
            what["threshold"] = self.threshold
        self.target = None
        attached = self.attached
        self.detach()
        try:
            if loop_target is None:
                small = prune(self.model, self.guide, self.example_input, **what)
            else:
                choice, self.target = loop_target.choose(
                    self.model, self.guide, self.example_input, **what
                )
                small = shrink_to(self.model, choice, self.example_input)
        except BaseException as error:
            if attached:
                self.attach()
            if isinstance(error, ValueError) and self._untrained():
                raise ValueError(
                    f"{error}; all units have the same signal-to-noise ratio, so the noise was not "
                    "trained"
                ) from error
            raise
        if loop_target is not None:
            if self.target is not None and self.target.far:
                warnings.warn(loop_target.warning(self.target), stacklevel=2)
        elif not budgets & what.keys() and all(
            bool(units.kept.all()) for units in (units_of(small) or {}).values()
        ):
            smallest = min(float(snr.min()) for snr in self.guide.snr().values())
            warnings.warn(
                "no unit was removed; the smallest signal-to-noise ratio of a unit is "
                f"{smallest:.4g}. Train the noise for more epochs, or with a larger kl_scale or "
                "noise_learning_rate",
                stacklevel=2,
            )
        return small

    def _untrained(self) -> bool:
        """Whether the posterior still has its initial state."""
        snr = torch.cat([values.flatten() for values in self.guide.snr().values()])
        return bool((snr == snr[0]).all())

    def state_dict(self) -> dict[str, Any]:
        """The state of the posterior, and with a target, that of the weights of its KL divergence
        as plain values. It does not contain the network.
        """
        state: dict[str, Any] = self.guide.state_dict()
        if self._loop_target is not None:
            state[_TARGET] = self._loop_target.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned. Training then continues as it would have.

        Raises:
            ValueError: the state and the pruner do not have the same target and `num_steps`.
        """
        posterior = dict(state)
        target = posterior.pop(_TARGET, None)
        if self._loop_target is None and target is not None:
            raise ValueError(
                f"the state has a target of MACs; create the pruner with target_macs_ratio="
                f"{target['ratio']:g} and num_steps={target['num_steps']}, as for the state"
            )
        if self._loop_target is not None and target is None:
            raise ValueError(
                "the state has no target of MACs, but the pruner has; create the pruner without "
                "target_macs_ratio, or load only the posterior with guide.load_state_dict"
            )
        if self._loop_target is not None and target is not None:
            self._loop_target.check_state(target)
        self.guide.load_state_dict(posterior)
        if self._loop_target is not None and target is not None:
            self._loop_target.load_state_dict(target, self.model)

    def _theta(self, x: Any) -> dict[str, Tensor]:
        """The theta of the units: a sample in training mode, else that of the pruned network."""
        if self.net.training:
            self.noisy_calls += 1
            theta: dict[str, Tensor] = self.guide(x)
            return theta
        mean, snr = self.guide.mean(), self.guide.snr()

        def kept(snr: Tensor) -> Tensor:
            # Every gate keeps its best unit, the first of equal ones, as in `prune`.
            best = snr.double().argsort(descending=True, stable=True)[:1]
            return (snr >= self.threshold).index_fill(0, best, True)

        return {name: value * kept(snr[name]) for name, value in mean.items()}

    @noise_hook
    def _begin(self, net: nn.Module, args: Any, kwargs: Any) -> None:
        frozen = self._frozen()
        frozen.__enter__()
        noise = gating(net, self.gates, self._theta(args or kwargs))
        noise.__enter__()
        self._contexts += [frozen, noise]

    def _end(self, net: nn.Module, args: Any, output: Any) -> None:
        # After a call that failed before the noise was drawn, there is nothing to close.
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)
        self._contexts.clear()

    def _frozen(self) -> AbstractContextManager[None]:
        """Within the context, batch norms use their running statistics.

        With batch statistics, a factor common to all units of a layer would not change the
        likelihood.
        """
        return _in_evaluation(self.net) if self.net.training else nullcontext()


@contextmanager
def _in_evaluation(net: nn.Module) -> Iterator[None]:
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.training]
    for module in norms:
        module.training = False
    try:
        yield
    finally:
        for module in norms:
            module.training = True
