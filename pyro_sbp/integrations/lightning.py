"""Structured Bayesian pruning as a callback of Lightning.

Needs the package ``lightning``: ``pip install 'pyro-sbp[lightning]'``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from pyro_sbp.gates.nested import map_tensors
from pyro_sbp.pruning.pruner import Pruner

__all__ = ["PruneCallback"]


class PruneCallback(Callback):
    """Train with noise in some epochs, and then replace the network by the pruned network.

    The training step does not change: the callback adds the KL divergence to the gradients and
    trains the posterior by a separate Adam optimizer. After the cut it calls `configure_optimizers`
    again. In validation, the network computes the same function as the pruned network.

    The number of units that every gate keeps is logged as ``units/GATE`` after every epoch with
    noise.

    Args:
        network: the name of the attribute of the `LightningModule` that holds the network, such as
            ``"net"``, which its training step calls.
        example_input: an input of the network, as for `pyro_sbp.find_gates`.
        start_epoch, end_epoch: noise is trained in epochs with start_epoch <= epoch < end_epoch.
        num_data: the number of training examples; by default the length of the training data set.
        what: what to keep, as for `pyro_sbp.prune`, such as ``{"macs_ratio": 2}``; by default the
            units whose signal-to-noise ratio reaches the threshold.
        options: for `pyro_sbp.Pruner`, such as ``kl_scale`` and ``noise_learning_rate``.

    Attributes:
        pruner: the `Pruner`, from the first epoch with noise on.

    Raises:
        ValueError: the epochs are not in order.
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
        self.what, self.options = dict(what or {}), options
        self.pruner: Pruner | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._saved: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before training that the callback can be used."""
        if stage != "fit":
            return
        if not isinstance(pl_module._modules.get(self.network), nn.Module):
            raise ValueError(
                f"{type(pl_module).__name__} has no network {self.network!r}; its modules are "
                f"{', '.join(name for name, _ in pl_module.named_children())}"
            )
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

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put noise on the network at the start of the first epoch with noise."""
        if self.pruner is not None or not (
            self.start_epoch <= trainer.current_epoch < self.end_epoch
        ):
            return
        net = pl_module._modules[self.network]
        assert isinstance(net, nn.Module)
        device = next(net.parameters()).device
        example_input = map_tensors(lambda x: x.to(device), self.example_input)
        num_data = self.num_data or _examples(trainer)
        pruner = Pruner(net, example_input, num_data, **self.options)
        self._optimizer = torch.optim.Adam([pruner.noise_group()])
        if self._saved:
            pruner.load_state_dict(self._saved["posterior"])
            self._optimizer.load_state_dict(self._saved["optimizer"])
        self.pruner = pruner.attach()

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
        if trainer.current_epoch == self.end_epoch - 1:
            setattr(pl_module, self.network, self.pruner.prune(**self.what))
            self._optimizer = None
            trainer.strategy.setup_optimizers(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The posterior and its optimizer, for a checkpoint of an epoch with noise."""
        if self.pruner is None or self._optimizer is None:
            return {}
        return {
            "posterior": self.pruner.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state from `state_dict` until the noise is put on the network."""
        self._saved = state_dict


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
