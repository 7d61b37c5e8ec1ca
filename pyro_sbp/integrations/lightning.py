"""Structured Bayesian pruning as a callback of Lightning.

Needs the package ``lightning``: ``pip install 'pyro-sbp[lightning]'``.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.nn.parameter import is_lazy

from pyro_sbp.gates.nested import map_tensors
from pyro_sbp.gates.units import units_of
from pyro_sbp.pruning.budgets import ratio_budget
from pyro_sbp.pruning.loop_target import check_loop_target
from pyro_sbp.pruning.pruner import CHOOSING, Pruner, without_defaults
from pyro_sbp.pruning.pruning import prune

__all__ = ["PruneCallback"]


class PruneCallback(Callback):
    """Train with noise in some epochs, and then replace the network by the pruned network.

    The training step does not change: the callback adds the KL divergence to the gradients and
    trains the posterior by a separate Adam optimizer with a constant learning rate. After the cut
    it calls `configure_optimizers` again, so schedulers of the learning rate start again. In
    validation, the network computes the same function as the pruned network (with a target, as the
    network that the threshold alone gives).

    A checkpoint of an epoch with noise contains the posterior. With this checkpoint, `fit`
    continues, and `validate`, `test` and `predict` measure the network as it would be pruned.

    The number of units that every gate keeps is logged as ``units/GATE`` after every epoch with
    noise. If the training ends earlier than `end_epoch`, a `UserWarning` is given. An error of
    `Pruner`, such as a target that the network cannot reach, is raised when the training starts.

    Args:
        network: the name of the attribute of the `LightningModule` that holds the network, such as
            ``"net"``, which its training step calls.
        example_input: an input of the network, as for `pyro_sbp.find_gates`.
        start_epoch, end_epoch: noise is trained in epochs with start_epoch <= epoch < end_epoch.
        num_data: the number of training examples; by default the length of the training data set.
        what: what to keep, as for `pyro_sbp.prune`, such as ``{"macs_ratio": 2}``; by default the
            units whose signal-to-noise ratio reaches the threshold, or those of the target.
        options: for `pyro_sbp.Pruner`, such as ``kl_scale`` and ``target_macs_ratio``, or more of
            what to keep, such as ``macs_ratio``. For a target, ``num_steps`` is by default the
            number of steps of the optimizer in the epochs with noise.

    Attributes:
        pruner: the `Pruner`, from the first epoch with noise on.

    Raises:
        ValueError: the epochs are not in order, a ratio is out of range, an option is given twice,
            or options contradict each other.
        TypeError: an option is unknown.
    """

    def __init__(
        self,
        network: str,
        example_input: Any,
        start_epoch: int,
        end_epoch: int,
        *,
        num_data: int | None = None,
        what: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not 0 <= start_epoch < end_epoch:
            raise ValueError(
                f"start_epoch is {start_epoch} and end_epoch is {end_epoch}; expected "
                "0 <= start_epoch < end_epoch"
            )
        self.network, self.example_input, self.num_data = network, example_input, num_data
        self.start_epoch, self.end_epoch = start_epoch, end_epoch
        self.what, self.options = _split(what or {}, options)
        _check_target(self.what, self.options)  # before the training
        self.pruner: Pruner | None = None
        #: The pruned network, after the cut.
        self._small: nn.Module | None = None
        #: The optimizer of the posterior, while it is trained.
        self._optimizer: torch.optim.Optimizer | None = None
        #: The state from a checkpoint, until the posterior is trained further.
        self._saved: dict[str, Any] = {}
        self._read_states = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before training that the callback can be used."""
        net = self._network(pl_module)
        self._read_states = False
        if _explain_sizes not in net._load_state_dict_pre_hooks.values():
            net.register_load_state_dict_pre_hook(_explain_sizes)
        if self.pruner is not None and net is not self.pruner.net and net is not self._small:
            # Either the user has pruned the network, or it belongs to another module.
            if not self.pruner.attached and units_of(net) is not None:
                self._small, self._optimizer = net, None
            else:
                self._forget()
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise ValueError(
                "PruneCallback replaces the network during training, which works on one device; "
                f"there are {trainer.world_size}"
            )
        if trainer.precision == "16-mixed":
            raise ValueError(
                "PruneCallback cannot scale gradients, as precision 16-mixed does; use bf16-mixed"
            )
        last = trainer.max_epochs
        if last is not None and 0 <= last < self.end_epoch:
            raise ValueError(
                f"end_epoch is {self.end_epoch}, but training ends after {last} epochs, before the "
                "network is pruned"
            )
        if any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks):
            _warn(
                "with save_weights_only, the checkpoints of epochs with noise do not contain the "
                "noise, without which their weights compute another function"
            )

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state of the posterior until the network is on its device."""
        self._read_states = True
        if self._small is None or self._small is not self._network(pl_module):
            self._forget()
            self._saved = checkpoint["callbacks"].get(self.state_key, {})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the posterior and its optimizer to a checkpoint of an epoch with noise."""
        state = self._saved
        if self.pruner is not None and self.pruner.net is self._network(pl_module):
            state = {**self._saved, "posterior": self.pruner.state_dict()}
            if self.pruner.num_steps is not None:
                state["num_steps"] = self.pruner.num_steps
            if self._optimizer is not None:
                state["optimizer"] = self._optimizer.state_dict()
        if state:
            checkpoint["callbacks"][self.state_key] = state

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the noise of a checkpoint on the network."""
        self._prepare(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the noise of a checkpoint on the network."""
        self._prepare(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the noise of a checkpoint on the network."""
        self._prepare(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the epochs without noise that the network can be pruned as asked."""
        if self._small is not None or self.pruner is not None or self._saved:
            return
        if trainer.current_epoch < self.start_epoch:
            # The result is discarded: the weights change until the noise is put on the network.
            self._make(trainer, pl_module, self.num_data or _examples(trainer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put noise on the network at the start of the first epoch with noise."""
        if self._small is not None:
            return
        epoch = trainer.current_epoch
        if self._optimizer is None:
            if not self._saved and not self.start_epoch <= epoch < self.end_epoch:
                return
            pruner = self._put(trainer, pl_module, self.num_data or _examples(trainer))
            self._optimizer = torch.optim.Adam([pruner.noise_group()])
            if "optimizer" in self._saved:
                self._optimizer.load_state_dict(self._saved["optimizer"])
            self._saved = {}
        elif self.pruner is not None:
            self.pruner.to(_device(self.pruner.net))
            if not self.pruner.attached:  # the user has called its method `prune`
                self.pruner.attach()
        if epoch >= self.end_epoch:  # a checkpoint of the last epoch with noise, before the cut
            self._cut(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradients of the KL divergence, and take a step of the posterior."""
        if self.pruner is None or self._optimizer is None:
            return
        self.pruner.kl_loss().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the numbers of kept units, and prune after the last epoch with noise."""
        if self.pruner is None or self._optimizer is None:
            return
        if not self.pruner.noisy_calls:
            raise RuntimeError(
                f"the training step did not call the network {self.network!r}, so its noise was "
                "not trained"
            )
        units = self.pruner.units()
        pl_module.log_dict({f"units/{name}": float(count) for name, count in units.items()})
        if trainer.current_epoch >= self.end_epoch - 1:
            self._cut(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the network was not pruned."""
        name, end = self.network, self.end_epoch
        ended = f"training ended after {trainer.current_epoch} epochs, before end_epoch = {end}"
        hint = f"(with EarlyStopping: Trainer(min_epochs={end}))"
        if self.pruner is not None and self.pruner.attached:
            _warn(
                f"{ended}: the network {name!r} is not pruned and still has noise; prune it with "
                f"module.{name} = callback.pruner.prune(), or train until end_epoch {hint}"
            )
        elif self.pruner is None and self._small is None and trainer.current_epoch < end:
            _warn(f"{ended}: the network {name!r} is not pruned; train until end_epoch {hint}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move the posterior to the device to which Lightning has moved the network."""
        if self.pruner is not None:
            self.pruner.to(_device(self.pruner.net))

    def _network(self, pl_module: LightningModule) -> nn.Module:
        net = pl_module._modules.get(self.network)
        if not isinstance(net, nn.Module):
            names = [name for name, _ in pl_module.named_children()]
            raise ValueError(
                f"{type(pl_module).__name__} has no network {self.network!r}; its modules are "
                f"{', '.join(names) or 'none'}. Put the layers to prune into one module, which is "
                f"an attribute of the LightningModule, and call it in the training step"
            )
        return net

    def _forget(self) -> None:
        if self.pruner is not None:
            self.pruner.detach()
        self.pruner = self._small = self._optimizer = None
        self._saved = {}

    def _put(self, trainer: Trainer, pl_module: LightningModule, num_data: int) -> Pruner:
        """Put noise on the network, with the posterior of a checkpoint if there is one."""
        if self.pruner is not None:
            self.pruner.detach()
        pruner = self._make(trainer, pl_module, num_data)
        if self._saved:
            pruner.load_state_dict(self._saved["posterior"])
        self.pruner = pruner.attach()
        return pruner

    def _make(self, trainer: Trainer, pl_module: LightningModule, num_data: int) -> Pruner:
        """A pruner of the network, whose noise is not attached yet.

        Raises:
            ValueError: as for `Pruner`, or the number of steps for a target is not known.
        """
        net = self._network(pl_module)
        device = _device(net)
        example_input = map_tensors(lambda x: x.to(device), self.example_input)
        options = dict(self.options)
        if options.get("target_macs_ratio") is not None and options.get("num_steps") is None:
            options["num_steps"] = self._num_steps(trainer, pl_module)
        return Pruner(net, example_input, num_data, **options)

    def _num_steps(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """The number of steps with noise: that of the checkpoint, or of this training.

        Raises:
            ValueError: the number is not known, or the checkpoint has noise without a target.
        """
        if self._saved:
            if "num_steps" not in self._saved:
                raise ValueError(
                    "the noise of the checkpoint has no target; leave target_macs_ratio out"
                )
            return int(self._saved["num_steps"])
        batches = trainer.num_training_batches
        varying = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)
        if not pl_module.automatic_optimization or varying or not math.isfinite(batches):
            raise ValueError(
                "the number of steps of the optimizer with noise, which target_macs_ratio needs, "
                "is not known with manual optimization, GradientAccumulationScheduler or data "
                "without a length; give it as num_steps"
            )
        steps = math.ceil(batches / trainer.accumulate_grad_batches)
        return steps * (self.end_epoch - max(self.start_epoch, trainer.current_epoch))

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before an evaluation, put the noise of a checkpoint on the network."""
        if self._saved and self.pruner is None:
            # Finding gates needs more than inference tensors. The function of the network does not
            # depend on the number of examples.
            with torch.inference_mode(False):
                self._put(trainer, pl_module, self.num_data or 1)
        elif self.pruner is not None:
            self.pruner.to(_device(self.pruner.net))
        if trainer.ckpt_path and not self._read_states and self._small is None:
            _warn(
                f"{trainer.ckpt_path} has only weights, so it is not known whether they were "
                "trained with noise, which would then be missing"
            )

    def _cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.pruner is not None
        self._small = self.pruner.prune(**self.what)
        setattr(pl_module, self.network, self._small)
        self._optimizer = None
        trainer.strategy.setup_optimizers(trainer)


def _split(
    what: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to keep, and the options of a `Pruner`.

    Raises:
        ValueError: an option is given twice, or a ratio is out of range.
        TypeError: an option is unknown.
    """
    of_prune, of_pruner = _keywords(prune), _keywords(Pruner)
    for name in what:
        if name not in of_prune:
            raise TypeError(f"what has {name!r}; expected some of {', '.join(of_prune)}")
    for name in options:
        if name not in of_prune | of_pruner:
            raise TypeError(
                f"PruneCallback has no option {name!r}; expected some of "
                f"{', '.join(of_pruner | of_prune)}"
            )
        if name in what:
            raise ValueError(f"{name} is given twice, also in what")
    kept = {name: value for name, value in options.items() if name not in of_pruner}
    found = {**what, **kept}
    ratio_budget(found.get("macs_ratio"), found.get("parameters_ratio"))  # before the training
    return found, {name: value for name, value in options.items() if name in of_pruner}


def _check_target(what: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ValueError if the options of a target contradict each other or what to keep."""
    ratio, steps = options.get("target_macs_ratio"), options.get("num_steps")
    steps = 1 if steps is None and ratio is not None else steps  # computed from the training
    check_loop_target(ratio, steps, options.get("threshold", 1.0), options.get("costs"))
    chosen = [name for name in without_defaults(what) if name in CHOOSING]
    if ratio is not None and chosen:
        raise ValueError(
            f"target_macs_ratio and {chosen[0]} are given, which choose the units in two ways; "
            "give one of them"
        )


def _keywords(function: Any) -> dict[str, None]:
    """The names of the optional arguments of a function or a class, in their order."""
    empty = inspect.Parameter.empty
    parameters = inspect.signature(function).parameters.values()
    return {p.name: None for p in parameters if p.default is not empty}


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _explain_sizes(net: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """A hook of `load_state_dict` for a network that was pruned before or after a checkpoint."""
    errors = rest[-1]
    own = {prefix + name: value for name, value in net.named_parameters() if not is_lazy(value)}
    there = {name: state[name] for name in own if name in state}
    found = sum(value.numel() for value in there.values())
    expected = sum(own[name].numel() for name in there)
    name = prefix.rstrip(".")
    if found < expected:
        errors.append(
            f"the network {name!r} of the checkpoint is pruned; before loading it, set the "
            f"attribute {name!r} of the module to the pruned network, from pyro_sbp.load"
        )
    elif found > expected:
        errors.append(
            f"the network {name!r} of the module is pruned, and that of the checkpoint is not; "
            "use a new module"
        )


def _examples(trainer: Trainer) -> int:
    """The number of training examples.

    Raises:
        ValueError: the training data set has no length.
    """
    data = getattr(trainer.train_dataloader, "dataset", None)
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(
            "the training data set has no length; give the number of training examples as num_data"
        ) from error
