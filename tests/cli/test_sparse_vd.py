"""Sparse variational dropout as a method: phases, what it tells, and random labels."""

import json

import pytest
import torch
from helpers import run, stops_after

import pyro_sbp as sbp
from pyro_sbp.cli.stopping import Stopped
from pyro_sbp.methods import SparseVD
from pyro_sbp.recipes.method_recipes import SparseVDRecipe

QUICK = """
dense_epochs = 0
epochs = 4
kl_free_epochs = 1
kl_rising_epochs = 2
finetune_epochs = 1
batch_size = 64
init_log_scale = -4.0
noise_learning_rate = 0.1
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    (root / "quick.toml").write_text(QUICK)
    args = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--method", "sparse-vd"]
    args += ["--recipe", root / "quick.toml", "--device", "cpu", "--output-dir"]
    result = run(*args, root / "run")
    assert result.exit_code == 0, result.output
    return root / "run", result, args


def test_the_kl_rises_phase_by_phase(finished):
    directory, _, _ = finished
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    phases = ["kl-free", "kl-rising", "kl-rising", "sparse", "finetuned"]
    assert [line["phase"] for line in lines] == phases
    # Its weight, from its mean over the epoch: 0, a quarter, three quarters, 1 (the KL falls).
    assert lines[0]["weighted_kl"] == 0 < lines[0]["kl"]
    assert lines[3]["weighted_kl"] >= lines[3]["kl"]


def test_it_tells_of_weights_and_files(finished):
    directory, result, _ = finished
    summary = json.loads((directory / "summary.json").read_text())
    weights, files = summary["weights"], summary["files"]
    assert weights["total"] == 784 * 300 + 300 * 100 + 100 * 10
    assert weights["kept"] == sum(layer["kept"] for layer in weights["layers"])
    assert weights["compression"] == weights["total"] / weights["kept"] > 1
    net = sbp.load(directory / "pruned")
    left = sum(int(p.count_nonzero()) for p in net.parameters() if p.ndim > 1)
    assert 0 < left <= weights["kept"]  # fine-tuning keeps zeros
    assert files["sparse"] < files["pruned"] <= files["dense"]
    assert f"{weights['compression']:.1f} times fewer weights" in result.output
    assert "Zeros alone do not make the network faster" in result.output


def test_it_goes_on_within_every_phase(finished, tmp_path):
    directory, _, args = finished
    with stops_after(10), pytest.raises(Stopped):
        run(*args, tmp_path / "run")
    # Stopped before an epoch has ended, there are sites all the same.
    assert "0 of 4 epochs with noise" in run("inspect", tmp_path / "run").stdout
    for steps in (13, 27, 30):  # the end of the first epoch of 23 steps, and later phases
        with stops_after(steps), pytest.raises(Stopped):
            run("train", "--resume", tmp_path / "run")
    assert run("train", "--resume", tmp_path / "run").exit_code == 0
    for name in ("model.safetensors", "sparse.safetensors", "units.json"):
        ours = (tmp_path / "run" / "pruned" / name).read_bytes()
        assert ours == (directory / "pruned" / name).read_bytes()


def test_a_checkpoint_holds_the_weights_once(tmp_path):
    """Beside the optimizer's two tensors for each parameter: a weight, its variance, its scale."""
    (tmp_path / "quick.toml").write_text(QUICK)
    args = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--method", "sparse-vd"]
    with stops_after(3), pytest.raises(Stopped):
        run(*args, "--recipe", tmp_path / "quick.toml", "--output-dir", tmp_path / "run")
    weights = 784 * 300 + 300 * 100 + 100 * 10
    size = (tmp_path / "run" / "checkpoint.pt").stat().st_size
    assert size < 4 * weights * (6 + 1 + 0.1)


def test_prune_refuses_what_it_refuses_of_sbp(finished):
    directory, _, _ = finished
    for args, words in (
        (["--round-to", "0"], "round_to is 0"),
        (["--min-units", "-3"], "min_units is -3"),
        (["--macs-ratio", "1e9"], "cannot be met"),
    ):
        result = run("prune", directory, *args)
        assert result.exit_code == 2 and words in result.stderr, result.output


@pytest.mark.slow
def test_at_threshold_0_the_report_names_no_log_alpha(tmp_path):
    recipe = "dense_epochs = 0\nepochs = 1\nfinetune_epochs = 0\ncrop = 1\nthreshold = 0.0\n"
    (tmp_path / "all.toml").write_text(recipe)
    args = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--method", "sparse-vd"]
    result = run(*args, "--recipe", tmp_path / "all.toml", "--output-dir", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert run("report", tmp_path / "run").exit_code == 0
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "(SNR) of 0 or more are kept, so every weight is kept, whatever its log alpha." in page
    assert "-0 or less" not in page


@pytest.mark.slow
def test_of_random_labels_nothing_is_left_and_the_prediction_is_constant(tmp_path):
    recipe = QUICK.replace("epochs = 4", "epochs = 12").replace("finetune_epochs = 1\n", "")
    recipe += "random_labels = true\nkl_scale = 5.0\nfinetune_epochs = 0\n"
    (tmp_path / "random.toml").write_text(recipe)
    args = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--method", "sparse-vd"]
    result = run(*args, "--recipe", tmp_path / "random.toml", "--output-dir", tmp_path / "run")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["weights"]["kept"] < 0.01 * summary["weights"]["total"]
    assert summary["training_error"]["pruned"] > 85
    net = sbp.load(tmp_path / "run" / "pruned")
    assert len(net(torch.rand(100, 1, 28, 28)).argmax(1).unique()) == 1


def test_a_network_without_gates_can_be_sparse():
    x = torch.randn(8, 5)
    net = torch.nn.Sequential(torch.nn.Linear(5, 3))
    method = SparseVD(net, x, SparseVDRecipe(), num_data=8)
    method.prune(threshold=0.5)
    assert method.units == {} and method.recipe.threshold == pytest.approx(0.22313)
