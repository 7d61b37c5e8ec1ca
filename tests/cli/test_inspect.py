"""pyro-sbp inspect, in process."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import run, stops_after
from scipy import integrate

from pyro_sbp.cli.stopping import Stopped
from pyro_sbp.distributions import TruncatedLogNormal

QUICK = """
dense_epochs = 1
epochs = 3
init_log_scale = -1.0
finetune_epochs = 1
batch_size = 64
noise_learning_rate = 0.1
"""
# 23 steps an epoch: in the dense phase, in the second epoch with noise, in fine-tuning.
STEPS = {"dense": 10, "gated": 60, "finetuned": 100}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, and the same stopped in each phase."""
    root = tmp_path_factory.mktemp("runs")
    (root / "quick.toml").write_text(QUICK)
    args = ["train", "--arch", "lenet-300-100", "--dataset", "digits", "--device", "cpu"]
    args += ["--recipe", root / "quick.toml", "--output-dir"]
    assert run(*args, root / "finished").exit_code == 0
    for phase, steps in STEPS.items():
        with stops_after(steps), pytest.raises(Stopped):
            run(*args, root / phase)
    return root


def test_a_finished_run_has_the_units_that_were_handed_over(runs):
    result = run("inspect", runs / "finished", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    summary = json.loads((runs / "finished" / "summary.json").read_text())
    keys = ("gate", "kept", "zeroed", "total")
    assert [{key: gate[key] for key in keys} for gate in found["gates"]] == [
        {key: unit[key] for key in keys} for unit in summary["units"]
    ]
    assert found["finished"] and found["epoch"] == found["epochs"] == 3
    assert found["left_alone"] == summary["left_alone"]
    for gate in found["gates"]:
        quantiles = list(gate["snr"].values())
        assert quantiles == sorted(quantiles) and quantiles[0] < 1 <= quantiles[-1]
        under = [unit["snr"] for unit in gate["under"]]
        over = [unit["snr"] for unit in gate["over"]]
        assert len(under) == len(over) == 3 and max(under) < 1 <= min(over)
        assert under == sorted(under, reverse=True) and over == sorted(over)
        assert gate["held"] is False


def indices(text):
    """The numbers that indices with ranges stand for."""
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        yield from range(int(first), int(last or first) + 1)


def test_the_input_features_that_are_kept(runs):
    for directory, finished in (("finished", True), ("gated", False)):
        found = json.loads(run("inspect", runs / directory, "--json").stdout)["gates"]
        (gate,) = [gate for gate in found if gate["gate"] == "fc1_input"]
        assert len(gate["kept_units"]) == gate["kept"]
        if finished:
            path = runs / directory / "pruned" / "units.json"
            assert gate["kept_units"] == json.loads(path.read_text())["fc1_input"]["kept"]
        else:
            saved = torch.load(runs / directory / "checkpoint.pt", weights_only=True)
            q = TruncatedLogNormal(*saved["posteriors"]["fc1_input"], -20.0, 0.0)
            assert gate["kept_units"] == torch.nonzero(q.snr >= 1).flatten().tolist()
        text = run("inspect", runs / directory).stdout
        (words,) = re.findall(r"input features kept, fc1_input: ([\d,\- \n]+?)\n\n", text)
        assert list(indices(words)) == gate["kept_units"]


def test_the_ratio_is_that_of_the_moments_of_theta(runs):
    found = json.loads(run("inspect", runs / "finished", "--json").stdout)
    saved = torch.load(runs / "finished" / "checkpoint.pt", weights_only=True)
    for gate in found["gates"]:
        for unit in gate["under"] + gate["over"]:
            locs, scales = saved["posteriors"][gate["gate"]]
            loc, scale = float(locs[unit["unit"]]), float(scales[unit["unit"]])

            def moment(k, loc=loc, scale=scale):
                def density(x):
                    return np.exp(k * x - 0.5 * ((x - loc) / scale) ** 2)

                return integrate.quad(density, -20, 0, points=[max(-19.9, min(-0.1, loc))])[0]

            first, second = moment(1) / moment(0), moment(2) / moment(0)
            expected = first / np.sqrt(second - first**2)
            assert unit["snr"] == pytest.approx(expected, rel=1e-3)


def test_the_columns_say_what_they_hold(runs):
    text = run("inspect", runs / "finished").stdout
    assert "SNR min  SNR 25 %  SNR median  SNR 75 %  SNR max  E[theta]  KL, nats" in text
    (head,) = [line for line in text.splitlines() if "unit (SNR)" in line]
    assert re.split("  +", head) == ["gate", "unit (SNR) below 1", "unit (SNR) from 1 up"]


def test_a_run_that_stopped_says_so(runs):
    result = run("inspect", runs / "gated")
    assert result.exit_code == 0, result.output
    assert "not finished, 1 of 3 epochs with noise" in result.stdout
    assert "not prunable: fc3, reaches an output of the network" in result.stdout
    found = json.loads(run("inspect", runs / "gated", "--json").stdout)
    assert found["left_alone"] == {"fc3": "reaches an output of the network"}
    assert found["gates"][0]["zeroed"] is None
    # Fine-tuning leaves the posterior as it is.
    after = json.loads(run("inspect", runs / "finetuned", "--json").stdout)
    whole = json.loads(run("inspect", runs / "finished", "--json").stdout)
    assert not after["finished"] and after["epoch"] == 3
    for one, other in zip(after["gates"], whole["gates"], strict=True):
        assert one["snr"] == other["snr"] and one["kl"] == other["kl"]


def test_a_gate_under_the_threshold_keeps_its_best(runs, tmp_path):
    shutil.copytree(runs / "gated", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    del saved["checksum"]
    saved["posteriors"]["fc2"][1].fill_(90.0)  # the prior, nearly
    torch.save(saved, path)
    result = run("inspect", tmp_path / "run")
    assert "all units are under the threshold, so only the best is kept: fc2" in result.stdout
    gate = json.loads(run("inspect", tmp_path / "run", "--json").stdout)["gates"][-1]
    assert (gate["gate"], gate["kept"], gate["held"], gate["over"]) == ("fc2", 1, True, [])
    # An almost log-uniform theta on [e^-20, 1]: 1/20 over the root of 1/40 - 1/400.
    assert gate["snr"]["50"] == pytest.approx(1 / 3, abs=0.03)


def test_what_holds_no_posterior_is_refused_in_one_line(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "gated", tmp_path / "damaged")
    path = tmp_path / "damaged" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:2000])
    shutil.copytree(runs / "gated", tmp_path / "other")
    torch.save({"request": "{}", "finished": [], "place": {}}, tmp_path / "other" / "checkpoint.pt")
    shutil.copytree(runs / "gated", tmp_path / "new")
    (tmp_path / "new" / "checkpoint.pt").unlink()
    shutil.copytree(runs / "finished", tmp_path / "torn")
    (tmp_path / "torn" / "summary.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    for args, words in (
        ([tmp_path], "is not a run directory"),
        ([tmp_path / "nowhere"], "expected the directory of a run"),
        ([], "there is no run under runs/"),
        ([runs / "dense"], "has no posterior yet: it was stopped before there was noise"),
        (["new"], "has no posterior yet: there is no checkpoint.pt"),
        (["damaged"], "checkpoint.pt is damaged"),
        (["other"], "checkpoint.pt is damaged: it is not the checkpoint of a run"),
        (["torn"], "summary.json is damaged"),
    ):
        result = run("inspect", *args)
        assert result.exit_code == 2 and words in result.stderr, result.output
        assert len(result.stderr.strip().splitlines()) == 1
