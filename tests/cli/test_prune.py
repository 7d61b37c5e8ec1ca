"""pyro-sbp prune, in process."""

import json
from pathlib import Path

import pytest
from helpers import run

from pyro_sbp import saving
from pyro_sbp.datasets import load_dataset

QUICK = """
dense_epochs = 2
epochs = 3
init_log_scale = -1.0
finetune_epochs = 1
batch_size = 64
noise_learning_rate = 0.1
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (root / "quick.toml").write_text(QUICK)
    args = ("--arch", "lenet-300-100", "--dataset", "digits", "--recipe", root / "quick.toml")
    result = run("train", *args, "--output-dir", root / "run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return root / "run"


def test_the_recipe_s_threshold_gives_the_pruned_network_of_the_run(finished):
    result = run("prune", finished, "--threshold", "1", "--json")
    assert result.exit_code == 0, result.output
    first = json.loads((finished / "summary.json").read_text())
    again = json.loads(result.stdout)
    for key in ("units", "macs", "equivalence"):
        assert again[key] == first[key]
    assert again["error"] == {**first["error"], "finetuned": None}
    assert run("prune", finished, "--threshold", "1").exit_code == 2


def test_a_budget_is_met_beside_the_run(finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "pruned").iterdir()}
    result = run("prune", finished, "--macs-ratio", "6", "--round-to", "8", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["macs"]["ratio"] >= 6
    assert all((unit["kept"] + unit["zeroed"]) % 8 == 0 for unit in summary["units"][1:])
    net = saving.load(finished / "pruned-macs-6-round-8")
    x, y = load_dataset("digits", Path("nowhere"), 28).test.batch(slice(None))
    error = 100 * float((net(x).argmax(1) != y).float().mean())
    assert error == pytest.approx(summary["error"]["pruned"], abs=1e-4)
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "pruned").iterdir()}


def test_nobody_is_told_of_a_threshold_that_nobody_gave(finished):
    result = run("prune", finished, "--macs-ratio", "2000")
    assert result.exit_code == 0, result.output
    assert "all units too weak for the budget, the best kept: fc1\n" in result.stdout
    assert "threshold" not in result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give --threshold, --macs-ratio, --round-to or --min-units"),
        (["--threshold", "1", "--macs-ratio", "2"], "not both"),
        (["--threshold", "-1"], "expected a signal-to-noise ratio >= 0"),
        (["--threshold", "1e9"], "removes every unit of every gate"),
        (["--macs-ratio", "1e9"], "times fewer MACs"),
        (["--threshold", "1", "--round-to", "0"], "round_to is 0"),
    ],
)
def test_bad_requests_write_nothing(finished, args, words):
    before = set(finished.iterdir())
    result = run("prune", finished, *args)
    assert result.exit_code == 2 and words in result.stderr
    assert set(finished.iterdir()) == before


def test_what_it_made_can_be_measured_and_exported(finished):
    assert run("prune", finished, "--round-to", "16").exit_code == 0
    network = finished / "pruned-round-16"
    result = run("bench", network, "--seconds", "0.05", "--threads", "1", "--batch-size", "1")
    assert result.exit_code == 0 and (network / "bench.json").exists()
    assert not (finished / "bench.json").exists()
    result = run("export", network, "--format", "pt2", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["file"] == str(finished / "pruned-round-16.pt2")
    (network / "network.json").write_text('{"input_shape": null}')
    assert run("export", network, "--format", "pt2").exit_code == 2
