"""Baselines of Torch-Pruning: the MACs asked for, the same training, and a record."""

import argparse
import dataclasses
import json

import pytest
import torch
from torch import nn

from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments import baselines
from pyro_sbp.experiments.baselines import baseline, main
from pyro_sbp.experiments.record import file_name
from pyro_sbp.experiments.torch_pruning import IMPORTANCES, prune_to, widths
from pyro_sbp.networks import LeNet300_100
from pyro_sbp.pruning.macs import count_macs
from pyro_sbp.recipes.named import RECIPES
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.train import train

SHORT = RECIPES["digits"].replace(dense_epochs=2, epochs=3, finetune_epochs=1)


def request(**changes):
    return Request("lenet-300-100", "digits", SHORT.replace(**changes), seed=1)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", image_size=28)


@pytest.fixture(scope="module")
def done(data):
    seen = []
    return baseline(request(), data, 12.0, "taylor", 2, seen.append), seen


def with_gradients(net, x):
    nn.functional.cross_entropy(net(x), torch.arange(len(x)) % 10).backward()
    return net.eval()


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 16, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10),
    )  # fmt: skip


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_network_with_batch_norm_has_just_the_macs_asked_for(importance):
    torch.manual_seed(0)
    x = torch.randn(16, 1, 8, 8)
    net = with_gradients(conv_net(), x)
    dense = count_macs(net, x[:1])
    score = IMPORTANCES[importance]()
    small = prune_to(net, dense / 4, x[:2], score, ["11"], 0)
    units = widths(small)
    assert units["11"] == 10 and count_macs(small, x[:1]) <= dense / 4
    # The unit more that is nearest to staying would be too much.
    fewer = prune_to(net, dense / 4 * 1.2, x[:2], score, ["11"], 0)
    assert count_macs(fewer, x[:1]) > dense / 4
    assert small(x).shape == (16, 10) and count_macs(net, x[:1]) == dense


def test_random_importance_is_of_the_seed():
    torch.manual_seed(0)
    x = torch.rand(2, 784)
    net, score = LeNet300_100(), IMPORTANCES["random"]()
    first, same, other = (prune_to(net, 50_000, x, score, ["fc3"], seed) for seed in (0, 0, 1))
    assert torch.equal(first(x), same(x)) and not torch.equal(first(x), other(x))


def test_units_go_by_their_importance_and_the_best_of_every_layer_stays():
    torch.manual_seed(0)
    x = torch.rand(2, 784)
    net = LeNet300_100()
    with torch.no_grad():
        net.fc1.weight[:60] *= 10
        net.fc2.weight[7] *= 10
    score = IMPORTANCES["magnitude"]()
    small = prune_to(net, 784 * 60 + 60 * 1 + 10, x, score, ["fc3"], 0)
    assert torch.equal(small.fc1.weight, net.fc1.weight[:60])
    assert torch.equal(small.fc2.weight, net.fc2.weight[7:8, :60])
    least = prune_to(net, 784 + 1 + 10, x, score, ["fc3"], 0)
    assert widths(least) == {"fc1": 1, "fc2": 1, "fc3": 10}
    with pytest.raises(ValueError, match="794 MACs are not possible: one unit per layer has 795"):
        prune_to(net, 794, x, score, ["fc3"], 0)


def test_the_record_of_a_baseline(done):
    entry, seen = done
    assert {
        "kind", "arch", "dataset", "method", "seed", "error", "macs", "parameters", "units",
        "epochs", "of", "settings", "versions", "machine", "train_seconds",
    } <= set(entry)  # fmt: skip
    assert entry["kind"] == "baseline" and entry["method"] == "torch-pruning taylor"
    assert entry["macs"]["dense"] == 266_200 and 12 <= entry["macs"]["ratio"] < 12.8
    kept = {unit["gate"]: unit["kept"] for unit in entry["units"]}
    assert list(kept) == ["fc1", "fc2"] and entry["left_alone"].keys() == {"fc3"}
    assert (
        entry["macs"]["pruned"] == 784 * kept["fc1"] + kept["fc1"] * kept["fc2"] + 10 * kept["fc2"]
    )
    assert entry["epochs"] == {"dense": 2, "finetuned": 4}
    ends = [(p.phase, p.epoch) for p in seen if p.error is not None]
    # Two steps: at once, and after half of two epochs.
    assert ends == [
        ("dense", 1), ("dense", 2), ("step 1", 1),
        ("finetuned", 1), ("finetuned", 2), ("finetuned", 3),
    ]  # fmt: skip
    assert entry["error"]["finetuned"] == seen[-1].error < entry["error"]["pruned"]


def test_it_is_pruned_in_equal_shares_and_learning_rates_fall_after_the_last(data):
    asked = request(dense_epochs=1, epochs=9, finetune_epochs=2)
    net = LeNet300_100()
    method = baselines._TorchPruning(net, data, asked, 8.0, "magnitude", 3, None)
    ratios, phases = [], []
    for phase in method.phases():
        ratios.append(method.macs / count_macs(method.small, method.example[:1]))
        phases.append((phase.name, phase.epochs, phase.decays))
    assert phases == [
        ("dense", 1, True), ("step 1", 1, False), ("step 2", 2, False),
        ("pruned", 0, True), ("finetuned", 8, True),
    ]  # fmt: skip
    assert ratios == pytest.approx([1, 2, 4, 8, 8], rel=0.05)


def test_a_baseline_is_of_its_seed_and_begins_as_the_run_does(done, data, tmp_path):
    entry, _ = done
    again = baseline(request(), data, 12.0, "taylor", 2)
    timeless = [{k: v for k, v in e.items() if k != "train_seconds"} for e in (entry, again)]
    assert timeless[0] == timeless[1]
    run = train(request(epochs=1, finetune_epochs=0), data, tmp_path / "run").to_dict()
    assert run["error"]["dense"] == entry["error"]["dense"]


def test_a_baseline_starts_from_the_weights_of_a_run(data, tmp_path, capsys):
    run = tmp_path / "dense-run"
    ours = train(request(epochs=1, finetune_epochs=0), data, run).to_dict()
    asked = dataclasses.replace(request(dense_epochs=0), weights=str(run / "dense.pt"))
    entry = baseline(asked, data, 4.0, "magnitude", 1, learning_rate=1e-3)
    assert entry["error"]["dense"] == ours["error"]["dense"]
    assert entry["learning_rate"] == 1e-3 and entry["epochs"] == {"dense": 0, "finetuned": 4}
    record = tmp_path / "ours.json"
    named = {"arch": "lenet-300-100", "dataset": "digits", "method": "sbp", "seed": 1}
    content = {**named, "recipe": "digits", "macs": {"ratio": 5.0}, "started_from": "a command"}
    record.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        main([str(record), "--importance", "random", "--steps", "1"])
    assert "give them by --weights. They were made by: a command" in capsys.readouterr().err


def test_a_baseline_in_float64_begins_as_the_run_does(data, tmp_path):
    asked = request(dense_epochs=1, epochs=2, finetune_epochs=0, batch_size=512)
    asked = dataclasses.replace(asked, precision="64-true")
    entry = baseline(asked, data, 4.0, "taylor", 1)
    run = train(asked, data, tmp_path / "run").to_dict()
    assert entry["error"]["dense"] == run["error"]["dense"] and entry["macs"]["ratio"] >= 4
    assert entry["calibration"]["test"]["dense"]["nll"] == pytest.approx(
        run["calibration"]["test"]["dense"]["nll"], rel=1e-12
    )


def test_the_command_has_the_options_of_the_baseline():
    options = argparse.Namespace(importance="taylor", learning_rate=None, steps=baselines.STEPS)
    start = "python -m pyro_sbp.experiments.baselines --importance taylor"
    assert baselines._command(request(), options) == start
    asked = dataclasses.replace(
        request(), device="cuda", channels_last=True, precision="64-true", weights="runs/a/dense.pt"
    )
    options.learning_rate, options.steps = 0.00123456789, 3
    assert baselines._command(asked, options) == (
        f"{start} --device cuda --channels-last --precision 64-true --weights a/dense.pt "
        "--learning-rate 0.00123456789 --steps 3"
    )


def test_what_cannot_be_done_is_refused(data):
    with pytest.raises(RequestError, match="steps is 3; expected 1 to 2"):
        baseline(request(), data, 2.0, "taylor", 3)
    with pytest.raises(RequestError, match="has no dense epochs"):
        baseline(request(dense_epochs=0), data, 2.0, "taylor", 1)
    with pytest.raises(ValueError, match=r"MACs ratio is 0\.5; expected a number >= 1"):
        baseline(request(), data, 0.5, "taylor", 1)


def test_a_record_is_matched_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "digits", SHORT)
    ours = {"arch": "lenet-300-100", "dataset": "digits", "method": "sbp"}
    ours |= {"seed": 1, "recipe": "digits"}
    path = tmp_path / "ours.json"
    path.write_text(json.dumps({**ours, "macs": {"ratio": 5.0}}))
    out = ["--output-dir", str(tmp_path / "out")]
    main([str(path), "3", "--importance", "random", "--steps", "1", *out,
          "--arch", "lenet-300-100", "--dataset", "digits", "--seed", "1"])  # fmt: skip
    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == [
        "lenet-300-100-digits-baseline-random-digits-1-steps-1.json",
        "lenet-300-100-digits-baseline-random-digits-3x-1-steps-1.json",
    ]
    found, other = (json.loads(f.read_text()) for f in files)
    assert found["macs"]["ratio"] >= 5 > other["macs"]["ratio"] >= 3 and found["of"] == "digits"
    assert found["command"].endswith("--importance random --steps 1 experiments/results/ours.json")
    assert other["command"].endswith("--recipe digits --seed 1 3")
    assert found["settings"] == SHORT.to_dict()
    with pytest.raises(SystemExit):
        main([str(path), "--importance", "random", "--seed", "2", *out])
    assert "--seed is 2, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("lenet5", "mnist", "lenet5", 0), "lenet5-mnist-lenet5-0.json"),
        (("a.b.dropout:lenet_300_100", "mnist", 0), "dropout-lenet-300-100-mnist-0.json"),
        (("lenet5", "folder:/some/where/cifar10-jpeg", 0), "lenet5-cifar10-jpeg-0.json"),
    ],
)
def test_the_file_of_a_record(parts, name):
    assert file_name(*parts) == name
