"""pyro-sbp prune, in process."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import run, train_quickly
from torch import nn

from pyro_sbp.cli import common
from pyro_sbp.cli.common import error_advice, find_network
from pyro_sbp.cli.prune_request import Options
from pyro_sbp.deployment.saving import save
from pyro_sbp.recipes.method_recipes import SBPRecipe
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.summary import Errors, Summary


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train_quickly("sbp", tmp_path_factory.mktemp("runs"))[0]


def test_advice_where_pruning_raised_the_error(finished):
    summary = Summary.read(finished / "summary.json")
    errors = [(1.0, 6.0, None), (1.0, 5.9, None), (1.0, 6.0, 1.2), (None, 6.0, None)]
    found = [
        error_advice(replace(summary, error=Errors(mean=mean, pruned=pruned, finetuned=last)))
        for mean, pruned, last in errors
    ]
    assert found[0].startswith("Pruning raised the test error by 5.0 points. Use --finetune-epochs")
    assert found[1:] == ["", "", ""]


@pytest.mark.parametrize("command", [("bench",), ("export", "--format", "onnx")])
def test_a_network_of_python_is_not_in_a_run(tmp_path, command):
    save(
        nn.Linear(2, 3),
        tmp_path / "small",
        nn.Linear,
        {"in_features": 2, "out_features": 3},
        units={},
    )
    result = run(*command, tmp_path / "small")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "small is a saved network outside of a run directory" in result.stderr


@pytest.mark.parametrize("where", [".", "..", "../pruned"])
def test_a_network_is_found_from_its_own_directory(finished, tmp_path, monkeypatch, where):
    below = finished / "pruned" / "below"
    below.mkdir(exist_ok=True)
    monkeypatch.chdir(below if where == ".." else below.parent)
    assert find_network(Path(where)) == (finished, finished / "pruned")


@pytest.mark.parametrize("devices", [0, 1])
def test_a_run_of_another_machine_is_not_told_to_choose_a_device(tmp_path, monkeypatch, devices):
    request = Request("lenet-300-100", "digits", SBPRecipe(), device="cuda")
    (tmp_path / "recipe.json").write_text(json.dumps(request.to_dict()))
    monkeypatch.setattr(common, "_cuda_devices", lambda: devices)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cause = "torch cannot use the CUDA device of" if devices else "there is no CUDA device on"
    line = (
        f"Error: {tmp_path} was made on a CUDA device, and {cause} this machine; use a machine "
        "with a CUDA device\n"
    )
    result = run("train", "--resume", tmp_path)
    assert (result.exit_code, result.stderr) == (2, line)
    (tmp_path / "summary.json").write_text("{}")
    result = run("prune", tmp_path, "--threshold", "2")
    assert (result.exit_code, result.stderr) == (2, line)
    new = ("train", "--arch", "lenet-300-100", "--dataset", "digits", "--device", "cuda")
    result = run(*new, "--output-dir", tmp_path / "run")
    assert (result.exit_code, result.stderr) == (
        2,
        f"Error: {cause} this machine; use --device cpu\n",
    )


def test_every_number_has_a_directory_of_its_own():
    none = dict.fromkeys(("criterion", "threshold", "macs_ratio", "parameters_ratio", "speedup"))
    none |= dict.fromkeys(("batch_size", "runtime", "max_error_increase", "distill"))
    none |= {"round_to": 1, "min_units": 1, "finetune_epochs": 1}
    names = {
        "threshold": "threshold",
        "macs_ratio": "macs",
        "max_error_increase": "max-error-increase",
    }
    for name, word in names.items():
        for value, text in ((1.0, "1"), (20.0, "20"), (1.0000001, "1.0000001"), (0.1, "0.1")):
            options = Options(**{**none, name: value, "distill": value})
            expected = f"pruned-{word}-{text}-finetuned-1-distill-{text}"
            assert options.directory_name() == expected


def test_nobody_is_told_of_a_threshold_that_nobody_gave(finished):
    result = run("prune", finished, "--macs-ratio", "2000")
    assert result.exit_code == 0, result.output
    assert "all units of fc1 are too weak for the budget: only the best is kept\n" in result.stdout
    assert "threshold" not in result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give --threshold, --macs-ratio, --parameters-ratio, --speedup, --max-error-increase"),
        (["--threshold", "1", "--macs-ratio", "2"], "not several"),
        (["--threshold", "-1"], "expected a signal-to-noise ratio >= 0"),
        (["--threshold", "1e9", "--min-units", "0"], "removes every unit of every gate"),
        (["--macs-ratio", "1e9"], "times fewer MACs"),
        (["--threshold", "1", "--round-to", "0"], "round_to is 0"),
        (["--parameters-ratio", "1e9"], "times fewer parameters"),
        (["--parameters-ratio", "0.5"], "parameters_ratio is 0.5; expected a number >= 1"),
        (["--speedup", "2", "--parameters-ratio", "2"], "give one of --parameters-ratio, --speed"),
        (["--speedup", "0.5"], "speedup is 0.5; expected a number >= 1"),
        (["--batch-size", "8", "--macs-ratio", "2"], "--batch-size applies to --speedup only"),
        (["--runtime", "eager"], "--runtime applies to --speedup only"),
        (["--max-error-increase", "0.5"], "train with --set holdout=143, "),
        (["--distill", "4"], "--distill applies to --finetune-epochs only"),
        (["--threshold", "1", "--round-to", "auto"], "has no unit_latency.json"),
        (["--threshold", "1", "--round-to", "eight"], "'eight' is not a valid integer"),
    ],
)
def test_bad_requests_write_nothing(finished, args, words):
    before = set(finished.iterdir())
    result = run("prune", finished, *args)
    assert result.exit_code == 2 and words in result.stderr
    assert set(finished.iterdir()) == before


def test_units_are_rounded_to_the_measured_vectors(finished):
    pairs = [(width, -(-width // 8)) for width in (8, 16, 17, 18, 20, 24, 32)]
    values = {"sizes": {"a": 32}, "milliseconds": {"a": pairs}}
    values |= {"batch_size": 1, "threads": 1, "device": "cpu"}
    file = finished / "unit_latency.json"
    file.write_text(json.dumps(values))
    try:
        result = run("prune", finished, "--macs-ratio", "2", "--round-to", "auto", "--json")
    finally:
        file.unlink()
    assert result.exit_code == 0, result.output
    assert "units are rounded to multiples of 8" in result.stderr
    units = json.loads(result.stdout)["units"]
    assert all((unit["kept"] + unit["zeroed"]) % 8 == 0 for unit in units)


def test_fewer_parameters_and_more_epochs(finished):
    options = ("--parameters-ratio", "3", "--finetune-epochs", "1", "--distill", "2", "--json")
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    result = run("prune", finished, *options)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["parameters"]["ratio"] >= 3 and summary["error"]["finetuned"] is not None
    assert re.search(r"^\d+ networks compared: the network has \d+\.\d\d times fewer parameters$",
                     result.stderr, flags=re.M)  # fmt: skip
    assert (finished / "pruned-parameters-3-finetuned-1-distill-2" / "network.json").exists()
    after = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert all(after[name] == time for name, time in before.items())


@pytest.mark.slow
def test_a_speedup_is_measured(finished):
    result = run("prune", finished, "--speedup", "1.01", "--batch-size", "32", "--json")
    assert result.exit_code == 0, result.output
    assert "times faster (eager, batch size 32, cpu, threads: " in result.stderr
    assert (finished / "pruned-speedup-1.01-batch-32-eager").exists()


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
