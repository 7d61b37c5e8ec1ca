"""What a run leaves: the saved network, and a summary of it."""

import json

import pytest
import torch
from tiny_network import Net, labelled_images

from pyro_sbp.deployment.loading import load
from pyro_sbp.deployment.memory import file_size
from pyro_sbp.deployment.saving import save
from pyro_sbp.recipes.method_recipes import RECIPE_CLASSES
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.train import train


@pytest.mark.parametrize("method", RECIPE_CLASSES)
def test_the_summary_is_that_of_the_files(method, tmp_path):
    data = labelled_images()
    recipe = RECIPE_CLASSES[method](
        dense_epochs=1, epochs=2, finetune_epochs=1, batch_size=20, noise_learning_rate=0.3,
        init_log_scale=-1.0, holdout=20, standardize=True,
    )  # fmt: skip
    request = Request("tiny_network:Net", "digits", recipe)
    summary = train(request, data, tmp_path / "run")

    saved = tmp_path / "run" / "pruned"
    net = load(saved, Net)
    parameters = list(net.parameters())
    assert summary.parameters.pruned == sum(p.numel() for p in parameters)
    assert summary.parameters.nonzero == sum(int(p.count_nonzero()) for p in parameters)
    assert summary.parameters.dense == 17 * 12 + 13 * 2 and summary.macs.dense == 16 * 12 + 12 * 2
    assert summary.macs.ratio == summary.macs.dense / summary.macs.pruned
    assert summary.files.pruned == (saved / "model.safetensors").stat().st_size
    sparse = saved / "sparse.safetensors"
    assert sparse.exists() == (summary.files.sparse is not None) == (summary.weights is not None)
    assert sparse.exists() == (method == "sparse-vd")
    units = json.loads((saved / "units.json").read_text())
    assert [(u.gate, u.kept, u.total, u.zeroed) for u in summary.units] == [
        (name, len(unit["kept"]), unit["total"], len(unit["zeroed"]))
        for name, unit in units.items()
    ]
    standardize = json.loads((saved / "network.json").read_text())["standardize"]
    assert standardize == summary.standardize
    x, y = data.test.batch(slice(None))
    x = (x - standardize["mean"][0]) / standardize["std"][0]
    error = 100 * float((net(x).argmax(1) != y).float().mean())
    assert summary.error.last == pytest.approx(error, abs=1e-4)
    nll = float(torch.nn.functional.cross_entropy(net(x).detach(), y))
    assert summary.calibration["test"]["finetuned"].nll == pytest.approx(nll, rel=1e-4)
    measured = {"dense", "mean", "pruned", "finetuned"}
    assert set(summary.calibration["test"]) == set(summary.calibration["validation"]) == measured
    assert summary.validation_error is not None and summary.training_error is None


def normed():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 3),
    )


def test_the_file_of_the_dense_network_has_the_size_of_a_saved_one(tmp_path):
    save(normed(), tmp_path / "net", constructor=normed)
    size = (tmp_path / "net" / "model.safetensors").stat().st_size
    assert file_size(normed()) == file_size(normed().to(torch.float64)) == size
