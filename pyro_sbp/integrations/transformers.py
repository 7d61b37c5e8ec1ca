"""Structured Bayesian pruning in the `Trainer` of Hugging Face transformers.

Needs the package ``transformers``: ``pip install 'pyro-sbp[transformers]'``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from pyro_sbp.pruning.pruner import Pruner

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

__all__ = ["PruneMixin"]

#: The file of a checkpoint that holds the posterior.
POSTERIOR = "posterior.pt"


class PruneMixin(_Base):
    """Adds noise and the KL divergence to a `Trainer`: ``class PruneTrainer(PruneMixin, Trainer)``.

    `train` trains with noise on the units of the model. `evaluate` and `predict` measure the model
    as it would be pruned now (with a target, by the threshold alone), during and after training,
    until ``trainer.pruner.prune()`` removes the noise and returns the smaller model. The posterior
    is part of the checkpoints.

    Args:
        args, kwargs: for the `Trainer`.
        pruner: a `pyro_sbp.Pruner` of its model.

    Raises:
        ValueError: the pruner belongs to another model, or one process uses several GPUs.
    """

    def __init__(self, *args: Any, pruner: Pruner, **kwargs: Any) -> None:
        self.pruner = pruner
        super().__init__(*args, **kwargs)
        if pruner.net is not self.model:
            raise ValueError("the pruner and the trainer have different models")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process uses {self.args.n_gpu} GPUs; start one for each of them, by torchrun"
            )
        pruner.to(self.args.device)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train with noise, which remains on the model until ``trainer.pruner.prune()``.

        With `load_best_model_at_end`, the posterior is that of the best checkpoint too.
        """
        found = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(str(self.args.output_dir))
        if found:
            self._load_posterior(found)
        if not self.pruner.attached:
            self.pruner.attach()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            self._load_posterior(best)
        return output

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer of the `Trainer`, which also trains the posterior."""
        optimizer = super().create_optimizer(*args, **kwargs)
        group = self.pruner.noise_group()
        known = {id(p) for g in optimizer.param_groups for p in g["params"]}
        if not known.issuperset(map(id, group["params"])):
            optimizer.add_param_group(group)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step of the `Trainer`, with the gradients of the KL divergence.

        The divergence depends only on the posterior, so its gradients are added separately. The
        returned loss contains its value.
        """
        loss = super().training_step(*args, **kwargs)
        kl = self.pruner.kl_loss() / self.current_gradient_accumulation_steps
        self.accelerator.backward(kl)
        self.pruner.average_gradients()
        return loss + kl.detach().to(loss)

    def _load_posterior(self, checkpoint: str) -> None:
        path = Path(checkpoint) / POSTERIOR
        if not path.exists():
            raise ValueError(
                f"{checkpoint} has no {POSTERIOR}, so its model was trained without this noise"
            )
        state = torch.load(path, weights_only=True, map_location=self.args.device)
        self.pruner.load_state_dict(state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model and the posterior."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            target = Path(output_dir or str(self.args.output_dir))
            torch.save(self.pruner.state_dict(), target / POSTERIOR)
