"""What the command line does with every method: one suite, which no method is exempt from."""

import json
from pathlib import Path

import pytest
import torch
from helpers import METHODS, run, stops_after, train_quickly

from pyro_sbp.cli.stopping import Stopped
from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.deployment import loading
from pyro_sbp.training import again
from pyro_sbp.training.runs import read_request


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tmp_path_factory):
    return train_quickly(request.param, tmp_path_factory.mktemp("runs"))


def without_times(summary):
    return {key: value for key, value in summary.items() if key != "train_seconds"}


def test_the_run_directory_tells_the_whole_story(finished):
    directory, result, _ = finished
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    told = json.loads((directory / "summary.json").read_text())
    sparse = {"pruned/sparse.safetensors"} if "weights" in told else set()
    assert names - {".lock"} == sparse | {
        "recipe.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "dense.pt",
        "summary.json",
        "pruned/model.safetensors",
        "pruned/network.json",
        "pruned/units.json",
    }
    recipe = json.loads((directory / "recipe.json").read_text())
    assert recipe["arch"] == "lenet-300-100" and recipe["recipe"]["epochs"] == 6
    assert recipe["versions"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    phases = [line["phase"] for line in lines]
    assert phases[:3] == ["dense"] * 3 and phases[9:] == ["finetuned"]
    assert not {"dense", "finetuned"} & set(phases[3:9])
    assert set(lines[0]) >= {"phase", "epoch", "loss", "nll", "kl", "error", "units", "seconds"}
    # The noise of SparseVD is on weights, which cost nothing of their own.
    noisy = set() if recipe["method"] == "sparse-vd" else set(phases) - {"dense", "finetuned"}
    assert {line["phase"] for line in lines if "macs" in line} == noisy
    assert result.stderr.count("  expected MACs ") == sum(phase in noisy for phase in phases)
    for line in lines:
        assert line["loss"] == pytest.approx(line["nll"] + line["weighted_kl"], rel=1e-6)
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["error"]["finetuned"] == lines[-1]["error"]
    assert summary["equivalence"]["max_rel_diff_float64"] <= 1e-10
    assert summary["left_alone"] == {"fc3": "reaches an output of the network"}
    assert "not prunable: fc3, reaches an output" in result.output
    assert "gate" in result.output and "MACs" in result.output and "fine-tuned" in result.output


def test_the_handed_over_network_has_the_recorded_error_units_and_macs(finished):
    directory, _, _ = finished
    summary = json.loads((directory / "summary.json").read_text())
    net = loading.load(directory / "pruned")
    x, y = load_dataset("digits", Path("nowhere"), 28).test.batch(slice(None))
    error = 100 * float((net(x).argmax(1) != y).float().mean())
    assert error == pytest.approx(summary["error"]["finetuned"], abs=1e-4)
    kept = {unit["gate"]: unit["kept"] + unit["zeroed"] for unit in summary["units"]}
    a, b, c = kept["fc1_input"], kept["fc1"], kept["fc2"]
    assert (net.fc1[-1].in_features, net.fc1[-1].out_features) == (a, b)
    assert summary["macs"]["pruned"] == a * b + b * c + c * 10
    assert summary["macs"]["dense"] == 784 * 300 + 300 * 100 + 100 * 10
    units = json.loads((directory / "pruned" / "units.json").read_text())
    assert net.fc1.select.index.tolist() == units["fc1_input"]["kept"]
    assert a < 784


def test_a_run_of_the_same_seed_that_is_stopped_ends_the_same(finished, tmp_path):
    directory, _, args = finished
    words = (*args, "--seed", 7, "--output-dir", tmp_path / "run", "--device", "cpu")
    # With 23 steps an epoch: in the dense phase, at the end of an epoch, with noise, in
    # fine-tuning.
    for steps in (10, 13, 77, 115):
        with stops_after(steps), pytest.raises(Stopped, match=f"train --resume {tmp_path / 'run'}"):
            run(*words)
        assert not (tmp_path / "run" / "summary.json").exists()
        words = ("train", "--resume", tmp_path / "run")
    left = tmp_path / "run" / "pruned.abc.part"  # as if a process was killed while it saved
    (left / "pruned").mkdir(parents=True)
    result = run("train", "--resume", tmp_path / "run", "--json")
    assert result.exit_code == 0 and not left.exists()
    first = json.loads((directory / "summary.json").read_text())
    second = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads(result.stdout) == second
    assert without_times(second) == without_times(first)
    lines = [(d / "metrics.jsonl").read_text().splitlines() for d in (directory, tmp_path / "run")]
    for old, new in zip(*lines, strict=True):
        assert {**json.loads(old), "seconds": 0} == {**json.loads(new), "seconds": 0}
    assert run("train", "--resume", tmp_path / "run").exit_code == 2


def test_bench_measures_and_names_the_machine(finished):
    directory, _, _ = finished
    result = run("bench", directory, "--seconds", "0.05", "--threads", "1")
    assert result.exit_code == 0 and "speed-up" in result.output and "cpu: " in result.output
    rows = json.loads((directory / "bench.json").read_text())
    cpu = [row for row in rows if row["device"].startswith("cpu")]
    assert [row["batch_size"] for row in cpu] == [1, 128]
    for row in rows:
        assert set(row) >= {
            "device", "threads", "batch_size", "dense_ms", "pruned_ms", "speedup", "spread",
        }  # fmt: skip
        assert 0 < row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["floor_ms"] > 0


def test_the_recipe_s_threshold_gives_the_pruned_network_of_the_run(finished):
    directory, _, _ = finished
    threshold = json.loads((directory / "recipe.json").read_text())["recipe"]["threshold"]
    result = run("prune", directory, "--threshold", threshold, "--json")
    assert result.exit_code == 0, result.output
    first = json.loads((directory / "summary.json").read_text())
    again = json.loads(result.stdout)
    for key in ("units", "macs"):
        assert again[key] == first[key]
    assert again["equivalence"]["max_rel_diff_float64"] <= 1e-10
    assert again["error"] == {**first["error"], "finetuned": None}
    assert run("prune", directory, "--threshold", threshold).exit_code == 2


def test_a_budget_is_met_beside_the_run(finished):
    finished, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (finished / "pruned").iterdir()}
    result = run("prune", finished, "--macs-ratio", "6", "--round-to", "8", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["macs"]["ratio"] >= 6
    assert all((unit["kept"] + unit["zeroed"]) % 8 == 0 for unit in summary["units"][1:])
    net = loading.load(finished / "pruned-macs-6-round-8")
    x, y = load_dataset("digits", Path("nowhere"), 28).test.batch(slice(None))
    error = 100 * float((net(x).argmax(1) != y).float().mean())
    assert error == pytest.approx(summary["error"]["pruned"], abs=1e-4)
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "pruned").iterdir()}


def test_inspect_tells_of_every_site(finished):
    directory, _, _ = finished
    result = run("inspect", directory, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["finished"] and found["epoch"] == found["epochs"] == 6
    assert found["left_alone"] == {"fc3": "reaches an output of the network"}
    total = {"units": 784 + 300 + 100, "weights": 784 * 300 + 300 * 100 + 100 * 10}
    assert sum(gate["total"] for gate in found["gates"]) == total[found["elements"]]
    for gate in found["gates"]:
        assert list(gate["snr"].values()) == sorted(gate["snr"].values())
        assert gate["kl"] >= 0 and 0 < gate["kept"] <= gate["total"]
        assert all(n["snr"] < found["threshold"] for n in gate["under"])
        assert all(n["snr"] >= found["threshold"] for n in gate["over"])
    assert "not prunable: fc3" in run("inspect", directory).stdout


def test_the_report_tells_of_the_run_and_sweeps_over_thresholds(finished):
    directory, _, _ = finished
    assert run("report", directory).exit_code == 0
    page = (directory / "report.html").read_text("utf-8")
    assert "No picture" not in page
    summary = json.loads((directory / "summary.json").read_text())
    assert f"{summary['macs']['ratio']:.2f} times fewer multiply-accumulates" in page
    pictures = {path.stem for path in (directory / "report").iterdir()}
    assert pictures >= {"error-macs", "error-threshold", "layers", "pixels", "snr", "training"}


@pytest.mark.parametrize("file_format", ["onnx", "pt2"])
def test_what_it_made_is_exported(finished, file_format):
    directory, _, _ = finished
    result = run("export", directory, "--format", file_format, "--json")
    assert result.exit_code == 0, result.output
    assert Path(json.loads(result.stdout)["file"]).exists()


#: A threshold over any signal-to-noise ratio that short training gives, and what makes it so.
HIGH, WIDE = 50.0, "init_log_scale = 0.0"


@pytest.mark.parametrize(
    "method", [m if m == "sbp" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_a_threshold_that_nothing_reaches_keeps_the_best_of_every_gate(method, tmp_path):
    """Training, pruning again and the sweep of the report end at the same network."""
    recipe = "dense_epochs = 0\nepochs = 3\nbatch_size = 64\nfinetune_epochs = 0\ncrop = 1\n"
    (tmp_path / "high.toml").write_text(f"{recipe}threshold = {HIGH}\n{WIDE}\n")
    directory = tmp_path / "run"
    args = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--method", method]
    result = run(*args, "--recipe", tmp_path / "high.toml", "--output-dir", directory)
    assert result.exit_code == 0, result.output
    assert "Nothing reaches the threshold" in result.stdout
    summary = json.loads((directory / "summary.json").read_text())
    gates = [unit["gate"] for unit in summary["units"]]
    assert summary["held"] == gates
    weights = method == "sparse-vd"  # whose units remain as columns of zeros
    assert [unit["kept"] for unit in summary["units"]] == [0 if weights else 1] * len(gates)
    for threshold in (HIGH, 2 * HIGH):
        pruned = run("prune", directory, "--threshold", threshold)
        assert pruned.exit_code == 0 and "Nothing reaches the threshold" in pruned.stdout
        found = load_state(directory / f"pruned-threshold-{threshold:g}")
        for name, value in load_state(directory / "pruned").items():
            torch.testing.assert_close(found[name], value)
    row = again.sweep(read_request(directory), digits(), directory)[-1]
    assert row["threshold"] == HIGH and row["held"] == gates
    assert row["macs"] == summary["macs"]["pruned"]
    assert run("report", directory).exit_code == 0
    page = (directory / "report.html").read_text("utf-8")
    assert ("none left" in page) == weights and "infx" not in page


def load_state(directory):
    return loading.load(directory).state_dict()


def digits():
    return load_dataset("digits", Path("nowhere"), 28)
