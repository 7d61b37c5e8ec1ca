"""A finished run pruned again, and at several thresholds."""

import pytest
import torch
from tiny_network import Net, labelled_images

from pyro_sbp.deployment.loading import load
from pyro_sbp.errors import RequestError
from pyro_sbp.pruning.budgets import MacsRatio
from pyro_sbp.pruning.macs import count_macs
from pyro_sbp.recipes.criteria import CRITERIA
from pyro_sbp.recipes.method_recipes import SBPRecipe
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.again import prune_again, sweep
from pyro_sbp.training.train import train

# Enough training that some units are far above the threshold, and the others at the prior.
RECIPE = SBPRecipe(
    dense_epochs=20, epochs=6, finetune_epochs=1, batch_size=20, learning_rate=0.01,
    noise_learning_rate=0.1, init_log_scale=-1.0, threshold=1.1,
)  # fmt: skip
REQUEST = Request("tiny_network:Net", "digits", RECIPE)


@pytest.fixture(scope="module")
def data():
    return labelled_images()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return directory, train(REQUEST, data, directory)


def test_other_settings_give_other_networks_beside_the_run(data, finished, tmp_path):
    directory, summary = finished
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.name != ".lock"}
    same = prune_again(REQUEST, data, directory, tmp_path / "same", threshold=1.1)
    assert (same.units, same.macs, same.error.pruned) == (
        summary.units, summary.macs, summary.error.pruned,
    )  # fmt: skip
    assert 0 < same.units[0].kept < 12
    assert same.error.finetuned is None and summary.error.finetuned is not None
    every = prune_again(REQUEST, data, directory, tmp_path / "every", threshold=0.0)
    assert [unit.kept for unit in every.units] == [12] and every.macs.pruned == 16 * 12 + 12 * 2
    few = prune_again(REQUEST, data, directory, tmp_path / "few", budget=MacsRatio(4.0))
    net = load(tmp_path / "few", Net)
    assert few.macs.pruned == count_macs(net, torch.zeros(1, 1, 4, 4)) <= (16 + 2) * 12 / 4
    with pytest.raises(RequestError, match="cannot be met"):
        prune_again(REQUEST, data, directory, tmp_path / "none", budget=MacsRatio(100.0))
    assert not (tmp_path / "none").exists()
    assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.name != ".lock"}


def test_a_sweep_has_the_thresholds_of_the_method_and_of_the_recipe(data, finished):
    rows = sweep(REQUEST, data, finished[0])
    thresholds = [row["threshold"] for row in rows]
    assert thresholds == sorted({*CRITERIA["snr"].sweep, 1.1})[: len(rows)] and 1.1 in thresholds
    macs = [row["macs"] for row in rows]
    assert macs == sorted(macs, reverse=True) and macs[0] == 16 * 12 + 12 * 2
    (own,) = (row for row in rows if row["threshold"] == 1.1)
    assert own["error"] == finished[1].error.pruned and own["split"] == "test"
    calibration = finished[1].calibration["test"]["pruned"]
    assert (own["nll"], own["ece"]) == (calibration.nll, calibration.ece)
    (least,) = sweep(REQUEST, data, finished[0], [1e9])
    assert list(least["units"].values()) == [1] and least["held"] == list(least["units"])
    with pytest.raises(RequestError, match="expected a signal-to-noise ratio >= 0"):
        sweep(REQUEST, data, finished[0], [-1.0])


def test_a_run_without_a_checkpoint_is_refused(data, tmp_path):
    with pytest.raises(RequestError, match="checkpoint"):
        sweep(REQUEST, data, tmp_path)


def test_the_smallest_network_within_an_error(tmp_path):
    recipe = RECIPE.replace(holdout=40)
    request = Request("tiny_network:Net", "digits", recipe)
    data, directory = labelled_images(), tmp_path / "run"
    train(request, data, directory)
    lines: list[str] = []
    summary = prune_again(
        request, data, directory, tmp_path / "small", max_error_increase=10.0, tell=lines.append
    )
    errors = summary.validation_error
    assert errors.pruned <= errors.dense + 10
    assert len(lines) == 1 and f"the error is {errors.pruned:.2f} %" in lines[0]
    # No threshold that was measured gives a smaller network within it.
    rows = sweep(request, data, directory)
    smaller = [row for row in rows if row["macs"] < summary.macs.pruned]
    assert all(row["error"] > errors.dense + 10 for row in smaller)
    whole = prune_again(
        request, data, directory, tmp_path / "whole", max_error_increase=100.0, tell=lines.append
    )
    assert whole.macs.pruned <= summary.macs.pruned


def test_an_error_needs_images_for_validation(data, finished, tmp_path):
    with pytest.raises(RequestError, match=f"train with --set holdout={len(data.train) // 10}, "):
        prune_again(REQUEST, data, finished[0], tmp_path / "none", max_error_increase=1.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": MacsRatio(2.0), "max_error_increase": 1.0}, "a macs_ratio or max_error_inc"),
        ({"distill": 4.0}, "set finetune_epochs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(data, finished, tmp_path, settings, words):
    with pytest.raises(RequestError, match=words):
        prune_again(REQUEST, data, finished[0], tmp_path / "none", **settings)
    with pytest.raises(RequestError, match="already exists"):
        prune_again(REQUEST, data, finished[0], tmp_path, threshold=1.0)


def test_fine_tuning_later_is_that_of_the_run(data, finished, tmp_path):
    directory, summary = finished
    again = prune_again(REQUEST, data, directory, tmp_path / "again", finetune_epochs=1)
    assert again.error.finetuned == pytest.approx(summary.error.finetuned, abs=5)
    changed = torch.nn.utils.parameters_to_vector(load(tmp_path / "again", Net).parameters())
    plain = prune_again(REQUEST, data, directory, tmp_path / "plain")
    assert plain.units == again.units
    before = torch.nn.utils.parameters_to_vector(load(tmp_path / "plain", Net).parameters())
    assert not torch.equal(changed, before)
