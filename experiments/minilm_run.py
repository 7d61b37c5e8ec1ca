"""A run of MiniLM: the stages that train its networks, and the files that they write."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_sbp as sbp
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments.minilm_network import (
    SentenceClassifier,
    build,
    description,
    example,
    pretrained,
)
from pyro_sbp.experiments.minilm_sentences import Batches, load_sentences
from pyro_sbp.gates.calling import evaluating
from pyro_sbp.gates.units import units_as_dicts
from pyro_sbp.models.calibration import measured, sums
from pyro_sbp.training.checkpoints import write_tensors
from pyro_sbp.training.files import write_json

__all__ = ["FOLDERS", "Run", "Settings"]

#: The settings of a run that are folders of its machine.
FOLDERS = ("model", "data")
#: The settings that runs of earlier versions did not write.
ADDED = ("holdout", *FOLDERS)


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        seed: the seed for the choice and the order of the sentences, for dropout and for the noise.
        sentences: the number of training sentences.
        dense_epochs, noise_epochs, finetune_epochs: the length of each phase.
        batch_size: the number of sentences per step.
        learning_rate: the learning rate of the weights in the dense phase and with noise. It decays
            linearly to 0.
        noise_learning_rate: the learning rate of the posterior.
        finetune_learning_rate: the learning rate of the weights of the smaller network. It decays
            linearly to 0.
        kl_scale, macs_weight: the weight of the KL divergence, and that of the MACs of a unit in
            it. With 2, the KL divergence of a head weighs 38 times as much as that of an MLP unit.
        distill: the temperature of the soft labels.
        budgets: the MACs ratios of the smaller networks.
    """

    seed: int = 0
    sentences: int = 20_000
    dense_epochs: int = 2
    noise_epochs: int = 4
    finetune_epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 5e-5
    noise_learning_rate: float = 2e-2
    finetune_learning_rate: float = 5e-5
    kl_scale: float = 0.07
    macs_weight: float = 2.0
    distill: float = 2.0
    budgets: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0)


def fit(
    net: nn.Module,
    batches: Batches,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    extra: Callable[[], Tensor] | None = None,
    after_epoch: Callable[[str], None] = print,
) -> None:
    """Train a network in bfloat16. The learning rate of the first group decays linearly to 0."""
    steps, step = epochs * len(batches), 0
    highest = optimizer.param_groups[0]["lr"]
    for epoch in range(epochs):
        net.train()
        total, seen, start = 0.0, 0, time.monotonic()
        for x, y in batches:
            optimizer.param_groups[0]["lr"] = highest * (1 - step / steps)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(**x)
            loss = F.cross_entropy(logits.float(), y)
            (loss if extra is None else loss + extra()).backward()
            optimizer.step()
            total, seen, step = total + float(loss.detach()) * len(y), seen + len(y), step + 1
        seconds = time.monotonic() - start
        after_epoch(f"  epoch {epoch + 1}/{epochs}  loss {total / seen:.4f}  {seconds:.0f} s")


@torch.no_grad()
def evaluate(net: nn.Module, batches: Batches) -> dict[str, float]:
    """Error and expected calibration error in percent, and negative log-likelihood, in float32."""
    with evaluating(net):
        total = torch.stack([sums(net(**x), y) for x, y in batches]).sum(0)
    return asdict(measured(total, len(batches.labels)))


def _check_settings(path: Path, asked: dict[str, Any]) -> None:
    """Compare settings with those of an existing run, if there is one.

    Runs of earlier versions do not have the settings `ADDED`, which are then not compared.

    Raises:
        RequestError: the run has other settings.
    """
    if not path.exists():
        return
    found = json.loads(path.read_text("utf-8"))
    names = [name for name in asked.keys() | found.keys() if name in found or name not in ADDED]
    others = sorted(name for name in names if found.get(name) != asked.get(name))
    if others:
        raise RequestError(
            f"{path} has other settings ({', '.join(others)}); give another run directory"
        )


class Run:
    """The files of a run, and the stages that create them.

    Args:
        directory: the run directory.
        model: the folder of the pretrained network.
        data: the folder of SST-2.
        settings: the settings. They must be those of the run if the directory already has one.
        holdout: the number of training sentences that are held out.
        validate: whether to test on the held-out sentences.

    Raises:
        RequestError: the run in the directory has other settings.
    """

    def __init__(
        self,
        directory: Path,
        model: Path,
        data: Path,
        settings: Settings,
        holdout: int = 2_000,
        validate: bool = False,
    ) -> None:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        asked = {**asdict(settings), "validate": validate, "holdout": holdout}
        asked |= {"model": str(model.resolve()), "data": str(data.resolve())}
        # Networks for further budgets can be added to a run later.
        del asked["budgets"]
        path = directory / "settings.json"
        _check_settings(path, asked)
        self.directory, self.model, self.settings = directory, model, settings
        self.train, self.test = load_sentences(
            AutoTokenizer.from_pretrained(model),
            data,
            count=settings.sentences,
            batch_size=settings.batch_size,
            seed=settings.seed,
            holdout=holdout,
            validate=validate,
        )
        if not path.exists():  # after the folders were read, so that a wrong one is not kept
            directory.mkdir(parents=True, exist_ok=True)
            write_json(path, asked)

    def dense(self) -> SentenceClassifier:
        """The fine-tuned dense network."""
        path = self.directory / "dense.pt"
        self.begin("dense")
        net = pretrained(self.model)
        if path.exists():
            net.load_state_dict(torch.load(path, weights_only=True))
            return net
        weights = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=self.settings.learning_rate, weight_decay=0.01)
        fit(net, self.train, self.settings.dense_epochs, optimizer)
        self.record("dense", net)
        write_tensors(path, net.state_dict())
        return net

    def noisy(self) -> sbp.Pruner:
        """The network and its posterior after the epochs with noise."""
        settings, net, path = self.settings, self.dense(), self.directory / "noisy.pt"
        self.begin("noise")
        pruner = sbp.Pruner(
            net,
            example(),
            num_data=settings.sentences,
            kl_scale=settings.kl_scale,
            macs_weight=settings.macs_weight,
            noise_learning_rate=settings.noise_learning_rate,
        )
        if path.exists():
            state = torch.load(path, weights_only=True)
            net.load_state_dict(state["net"])
            pruner.load_state_dict(state["posterior"])
            return pruner
        weights = [p for p in net.parameters() if p.requires_grad]
        groups = [{"params": weights, "lr": settings.learning_rate, "weight_decay": 0.01}]
        optimizer = torch.optim.AdamW([*groups, pruner.noise_group()])

        def report(line: str) -> None:
            print(f"{line}  units {'-'.join(map(str, pruner.units().values()))}")

        pruner.attach()
        fit(net, self.train, settings.noise_epochs, optimizer, pruner.kl_loss, report)
        pruner.detach()
        write_tensors(path, {"net": net.state_dict(), "posterior": pruner.state_dict()})
        return pruner

    def finetuned(self, name: str, epochs: int, prune: Callable[[], nn.Module]) -> None:
        """Prune the network, and train the smaller network with the dense network as teacher."""
        if (self.directory / name).exists():
            return
        small, settings = prune(), self.settings
        before = evaluate(small, self.test)
        teacher = self.dense()
        self.begin(name)
        units = units_as_dicts(small) or {}
        start = time.monotonic()
        sbp.fine_tune(
            small,
            self.train,
            epochs,
            teacher=teacher,
            distill=settings.distill,
            learning_rate=settings.finetune_learning_rate,
            precision="bf16-mixed",
            optimizer="adamw",
            weight_decay=0.01,
            schedule="linear",
            decay=1.0,
        )
        print(f"  {epochs} epochs of fine-tuning: {time.monotonic() - start:.0f} s")
        self.record(name, small, pruned=before, units=units)
        config = small.net.config.to_dict()  # type: ignore[union-attr,operator]
        sbp.save(small, self.directory / name, build, {"config": config}, units=units)

    def networks(self) -> list[str]:
        """The names of the smaller networks that are complete."""
        kinds = ("sbp", "magnitude")
        found = {path.parent.name for path in self.directory.glob("*/network.json")}
        known = [name.partition("-") for name in found]
        return [
            f"{kind}-{budget}"
            for kind in kinds
            for budget in sorted((b for k, _, b in known if k == kind), key=float)
        ]

    def begin(self, stage: str) -> None:
        """Seed the order of the sentences and the generator of torch for a stage."""
        torch.manual_seed(self.settings.seed)
        assert self.train.shuffle is not None
        self.train.shuffle.seed(f"{self.settings.seed} {stage}")

    def record(self, name: str, net: nn.Module, **more: Any) -> None:
        """Record the errors and the size of a network."""
        result = {**evaluate(net, self.test), **description(net), **more}
        write_json(self.directory / f"{name}.json", result)
        print(
            f"{name}: error {result['error']:.2f} %, {result['macs'] / 1e6:.1f} M MACs", flush=True
        )
