"""Runs with a target of MACs: what they reach, how they resume, and what they refuse."""

import json
import warnings

import pytest
import torch
from tiny_network import labelled_images

from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.errors import RequestError
from pyro_sbp.recipes import RBPRecipe, Request, SBPRecipe, SparseVDRecipe
from pyro_sbp.training.again import prune_again
from pyro_sbp.training.loop import Interrupted
from pyro_sbp.training.runs import Run
from pyro_sbp.training.summary import Summary
from pyro_sbp.training.train import train

QUICK = {
    "dense_epochs": 2,
    "epochs": 12,
    "finetune_epochs": 1,
    "batch_size": 32,
    "noise_learning_rate": 0.05,
    "init_log_scale": -2.5,
}


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", image_size=28)


@pytest.mark.parametrize(
    "arch, ratio, kl_scale",
    [
        ("tiny_network:Digits", 2.5, 5.0),
        pytest.param("lenet-300-100", 12.0, 0.3, marks=pytest.mark.slow),
    ],
)
def test_a_run_reaches_the_ratio_of_macs_that_was_asked_for(
    arch, ratio, kl_scale, tmp_path, digits
):
    """With weights of the KL divergence that are far too large or too small for it."""
    recipe = SBPRecipe(target_macs_ratio=ratio, kl_scale=kl_scale, **QUICK)
    request = Request(arch, "digits", recipe)
    if arch == "tiny_network:Digits":
        digits = load_dataset("digits")
    with warnings.catch_warnings(action="error"):  # the posterior is near the target
        found = train(request, digits, tmp_path / "run")
    assert ratio <= found.macs.ratio <= 1.1 * ratio
    assert found.target.macs_ratio == ratio
    assert found.target.ratio_by_threshold == pytest.approx(ratio, rel=0.25)
    noisy = [line["control"] for line in lines_of(tmp_path / "run") if "control" in line]
    assert len(noisy) == 12
    assert noisy[-1]["reference"] == pytest.approx(ratio)
    assert noisy[-1]["macs_ratio"] == pytest.approx(ratio, rel=0.2)
    stronger = [line["macs_weight"] > 0 for line in noisy]
    weaker = [line["kl_factor"] < 1 for line in noisy]
    assert any(stronger) if kl_scale < 1 else any(weaker)
    assert Run.read(tmp_path / "run").summary == found
    # Without other settings, the units are chosen by the same target again.
    again = prune_again(request, digits, tmp_path / "run", tmp_path / "again")
    assert again.units == found.units
    assert again.target == found.target
    other = prune_again(request, digits, tmp_path / "run", tmp_path / "other", threshold=1.0)
    assert other.macs.ratio == pytest.approx(found.target.ratio_by_threshold)
    assert other.target is None


TINY = {"dense_epochs": 1, "finetune_epochs": 1, "batch_size": 10, "noise_learning_rate": 0.1}
RECIPES = {
    "sbp": SBPRecipe(
        target_macs_ratio=2.0, epochs=8, cut_every=3, kl_free_epochs=1, kl_rising_epochs=1, **TINY
    ),
    "rbp": RBPRecipe(target_macs_ratio=2.0, epochs=6, order="together", **TINY),
    "costs": SBPRecipe(current_costs=True, macs_weight=1.0, epochs=4, **TINY),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore:the posterior is far from target_macs_ratio")
def test_a_run_that_is_stopped_ends_as_one_that_is_not(name, tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_sbp.methods.turn_phase.UPDATE_EVERY", 4)
    request = Request("tiny_network:Net", "digits", RECIPES[name])
    whole = train(request, labelled_images(), tmp_path / "whole")
    steps = 0

    def every_seventh_step():
        nonlocal steps
        steps += 1
        return steps % 7 == 0

    for _ in range(100):
        try:
            stopped = train(
                request, labelled_images(), tmp_path / "stopped", stop=every_seventh_step
            )
            break
        except Interrupted:
            pass
    assert steps > 50 and stopped.units == whole.units and stopped.target == whole.target
    controls = [
        [line["control"] for line in lines_of(tmp_path / run) if "control" in line]
        for run in ("whole", "stopped")
    ]
    assert controls[0] == controls[1] and len(controls[0]) == RECIPES[name].epochs
    weights = [
        torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["current"]["module"]
        for run in ("whole", "stopped")
    ]
    assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())
    again = prune_again(request, labelled_images(), tmp_path / "whole", tmp_path / "again")
    assert again.units == whole.units
    # The scores of RBP after its cut are not those of its posterior.
    assert again.target == (None if name == "rbp" else whole.target)
    if name != "costs":
        assert len({line["kl_factor"] for line in controls[0]}) > 2


def test_a_posterior_that_is_far_from_the_target_is_reported(tmp_path, digits):
    recipe = SBPRecipe(
        target_macs_ratio=4.0, dense_epochs=0, epochs=1, finetune_epochs=0, batch_size=256
    )
    message = "threshold 1 alone gives 1.00 times fewer MACs.*larger noise_learning_rate"
    with pytest.warns(UserWarning, match=message):
        found = train(Request("lenet-300-100", "digits", recipe), digits, tmp_path / "run")
    assert 4 <= found.macs.ratio <= 4.4
    assert found.target.threshold > 1 and found.target.ratio_by_threshold == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_macs_ratio": 0.5}, "target_macs_ratio is 0.5; expected a number >= 1"),
        ({"cost": "latency", "macs_weight": 1.0}, "weights units by their MACs; cost is latency"),
        ({"criterion": "bmrs-n"}, "needs signal-to-noise ratios .* criterion is bmrs-n"),
        ({"threshold": 0.0}, "a threshold > 0; threshold is 0.0"),
        ({"current_costs": True, "target_macs_ratio": None}, "no effect, because macs_weight is 0"),
    ],
)
def test_settings_that_contradict_a_target_are_refused(settings, message):
    with pytest.raises(RequestError, match=message):
        SBPRecipe(**{"target_macs_ratio": 3.0, **settings})


def test_targets_that_cannot_be_reached_are_refused_before_training(tmp_path, digits):
    def begin(recipe):
        train(Request("lenet-300-100", "digits", recipe), digits, tmp_path / "run")

    # One input, one unit in each hidden layer, ten classes: 12 of 266,200 MACs.
    with pytest.raises(
        RequestError, match=r"expected at most 22183\.33, .* one unit in every gate"
    ):
        begin(SBPRecipe(target_macs_ratio=30_000.0))
    with pytest.raises(RequestError, match="kl_scale is 0 for all gates"):
        begin(SBPRecipe(target_macs_ratio=3.0, kl_scale=0.0))
    with pytest.raises(RequestError, match="order is forward; use order together"):
        begin(RBPRecipe(target_macs_ratio=3.0))
    with pytest.raises(RequestError, match="'target_macs_ratio' is a setting of sbp and rbp"):
        SparseVDRecipe().replace(target_macs_ratio=3.0)
    assert not (tmp_path / "run").exists()


def test_summaries_without_a_target_have_no_field_for_it(tmp_path):
    request = Request("tiny_network:Net", "digits", SBPRecipe(epochs=1, **TINY))
    found = train(request, labelled_images(), tmp_path / "run").to_dict()
    assert "target" not in found and Summary.from_dict(found).target is None
