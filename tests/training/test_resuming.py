"""Runs that are stopped at any step and resumed end as runs that are not stopped."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_network import labelled_images

from pyro_sbp.recipes import RBPRecipe, Request, SBPRecipe, SparseVDRecipe
from pyro_sbp.training.loop import Interrupted
from pyro_sbp.training.train import train

SHORT = {"dense_epochs": 2, "finetune_epochs": 2, "batch_size": 10}
SGD = {
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "schedule": "cosine",
    "warmup": 0.2,
    "clip_gradient": 1.0,
    "label_smoothing": 0.1,
    "average": 0.9,
}
RECIPES = {
    "sgd": SBPRecipe(epochs=2, noise_learning_rate=0.2, kl_scale=20.0, **SHORT, **SGD),
    "cuts": SBPRecipe(
        epochs=7, cut_every=2, kl_rising_epochs=1, noise_learning_rate=0.2, kl_scale=20.0, **SHORT
    ),
    "one-cycle": RBPRecipe(epochs=3, optimizer="adamw", schedule="one-cycle", **SHORT),
    "sparse-vd": SparseVDRecipe(epochs=2, **SHORT, **SGD),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_is_stopped_ends_as_one_that_is_not(tmp_path, name):
    request = Request("tiny_network:Net", "digits", RECIPES[name])
    data = labelled_images()
    whole = train(request, data, tmp_path / "whole")

    steps = 0

    def every_seventh_step() -> bool:
        nonlocal steps
        steps += 1
        return steps % 7 == 0  # an epoch has 10

    for _ in range(200):
        try:
            resumed = train(request, data, tmp_path / "stopped", stop=every_seventh_step)
            break
        except Interrupted:
            pass
    assert steps > 50
    assert resumed.error == whole.error and resumed.units == whole.units
    ends = [
        [torch.load(tmp_path / run / "dense.pt", weights_only=True)]
        + [
            json.loads(line)["nll"]
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("whole", "stopped")
    ]
    assert ends[0][1:] == pytest.approx(ends[1][1:], rel=1e-5)
    assert all(torch.equal(ends[0][0][key], value) for key, value in ends[1][0].items())
