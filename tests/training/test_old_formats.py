"""Runs of the first version, of every method: finished ones, and ones stopped under noise."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pyro_sbp.cli import cli
from pyro_sbp.cli.stopping import Stopped
from pyro_sbp.deployment.loading import load
from pyro_sbp.recipes import RECIPES, RBPRecipe
from pyro_sbp.reports.posterior import read_posterior
from pyro_sbp.training import train as training
from pyro_sbp.training.checkpoints import Checkpoint
from pyro_sbp.training.old_recipes import recipe

RUNS = Path(__file__).parent / "old_runs"
METHODS = ("sbp", "rbp", "sparse-vd")


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """From the name of a stored run to a copy of it, with its network to be imported."""
    monkeypatch.syspath_prepend(RUNS)
    return lambda name: Path(shutil.copytree(RUNS / name, tmp_path / name))


def call(*words):
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    "method",
    [name if name == "sbp" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_a_finished_run_is_read(old_run, method):
    run = old_run(method)
    summary = json.loads((run / "summary.json").read_text())
    found = json.loads(call("inspect", run, "--json"))
    assert found["finished"] and found["epoch"] == found["epochs"] == 18
    elements = "weights" if method == "sparse-vd" else "units"
    assert found["elements"] == elements and not found["waiting"]
    if elements == "units":
        kept = {gate["gate"]: gate["kept"] for gate in found["gates"]}
        assert kept == {unit["gate"]: unit["kept"] for unit in summary["units"]}
        snr = {name: int((x >= 1).sum()) for name, x in read_posterior(run).snr().items()}
        assert snr == kept
    else:
        kept = {layer["layer"]: layer["kept"] for layer in summary["weights"]["layers"]}
        assert {layer["gate"]: layer["kept"] for layer in found["gates"]} == kept
    call("report", run, "--no-sweep")
    assert f"{summary['macs']['ratio']:.2f} times fewer" in (run / "report.html").read_text("utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_is_pruned_again_and_measured(old_run, method):
    from small_net import Net

    run = old_run(method)
    summary = json.loads((run / "summary.json").read_text())
    threshold = json.loads((run / "recipe.json").read_text())["recipe"]["threshold"]
    again = json.loads(call("prune", run, "--threshold", threshold, "--json"))
    assert again["units"] == summary["units"] and again["macs"] == summary["macs"]
    # Rounding may differ between processors by single test images.
    assert again["error"]["pruned"] == pytest.approx(summary["error"]["pruned"], abs=1)
    half = json.loads(call("prune", run, "--macs-ratio", 3, "--json"))
    assert half["macs"]["ratio"] >= 3
    call("bench", run, "--seconds", "0.01", "--batch-size", "1", "--threads", "1")
    small = load(run / "pruned", constructor=Net)
    assert sum(p.numel() for p in small.parameters()) == summary["parameters"]["pruned"]


def stop_after_an_epoch(monkeypatch):
    """Let a run stop at the end of the first epoch that it trains."""
    train = training.train

    def stopped(request, data, directory, watch, _, *rest):
        before = (directory / "metrics.jsonl").read_text()

        def stop():
            return (directory / "metrics.jsonl").read_text() != before

        return train(request, data, directory, watch, stop, *rest)

    monkeypatch.setattr(training, "train", stopped)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_under_noise_resumes(old_run, method, monkeypatch):
    run = old_run(f"stopped-{method}")
    saved = Checkpoint.read(run / "checkpoint.pt")
    assert saved.posteriors and "conv1.weight" in saved.network()
    seen = json.loads(call("inspect", run, "--json"))
    assert not seen["finished"] and (seen["waiting"] == ["fc1"]) == (method == "rbp")
    before = (run / "metrics.jsonl").read_text()
    whole = method == "rbp"  # of which a turn is left after this one
    if not whole:
        stop_after_an_epoch(monkeypatch)
        with pytest.raises(Stopped):
            call("train", "--resume", run)
    else:
        call("train", "--resume", run)
    assert (run / "metrics.jsonl").read_text().startswith(before)
    # The run that was not stopped went on like this; on another processor nearly so.
    resumed, other = (
        [json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()]
        for d in (run, RUNS / method)
    )
    first = len(before.splitlines())
    for key in ("loss", "nll", "kl"):
        assert resumed[first][key] == pytest.approx(other[first][key], rel=1e-3)
    if not whole:
        return
    told, ended = (json.loads((d / "summary.json").read_text()) for d in (run, RUNS / method))
    assert told["error"]["finetuned"] == pytest.approx(ended["error"]["finetuned"], abs=6)
    assert told["macs"]["ratio"] == pytest.approx(ended["macs"]["ratio"], rel=0.5)


def test_the_posterior_covers_units_that_were_removed_before_their_turn():
    saved = Checkpoint.read(RUNS / "rbp" / "checkpoint.pt")
    assert {name: len(loc) for name, (loc, _) in saved.posteriors.items()} == {
        "conv1": 6, "conv2": 8, "fc1": 16,
    }  # fmt: skip
    for loc, scale in saved.posteriors.values():
        assert loc.shape == scale.shape and bool((scale > 0).all()) and bool(loc.isfinite().all())
    assert isinstance(saved.request.recipe, RBPRecipe)
    assert [set(record) for record in saved.finished[1:3]] == [{"guide", "equivalence"}] * 2


def test_a_recipe_of_all_settings_becomes_one_of_its_method():
    old = json.loads((RUNS / "sparse-vd" / "recipe.json").read_text())["recipe"]
    assert {"prior_scale", "order", "macs_weight"} <= set(old)
    new = recipe(old, "sparse-vd")
    assert not {"prior_scale", "order", "macs_weight"} & set(new)
    assert {**old, **new} == old and new["threshold"] == 0.8
    unchanged = RECIPES["lenet5"].to_dict()
    assert recipe(unchanged, "sbp") == unchanged
    assert recipe({**unchanged, "typo": 1}, "sbp") == {**unchanged, "typo": 1}


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path):
    from pyro_sbp.errors import RequestError

    torch.save({"format": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(RequestError, match=r"has format 3; this version .* reads format 2"):
        Checkpoint.read(tmp_path / "checkpoint.pt")
