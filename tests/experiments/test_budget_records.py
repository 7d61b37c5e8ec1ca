"""What budgets promise, measured on a finished run, and the tables of these records."""

import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import torch

from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.deployment import speedup
from pyro_sbp.deployment.benchmarking import Comparison, Latency
from pyro_sbp.deployment.saving import save
from pyro_sbp.errors import RequestError
from pyro_sbp.experiments import budget_tables, budgets
from pyro_sbp.experiments.record import command
from pyro_sbp.gates.layers import Select
from pyro_sbp.networks import LeNet5
from pyro_sbp.recipes.named import RECIPES
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.files import write_json
from pyro_sbp.training.train import train

SMALL = {"dense_epochs": 1, "epochs": 2, "finetune_epochs": 0, "holdout": 300, "macs_weight": 1.0}


def latency(batch_size, dense_ms, pruned_ms, runtime="eager"):
    ratio = dense_ms / pruned_ms
    found = {"batch_size": batch_size, "runtime": runtime, "speedup": ratio}
    found |= {"dense_ms": dense_ms, "pruned_ms": pruned_ms, "threads": 1, "device": "cpu: x"}
    found["floor_ms"] = pruned_ms / 2
    return found | {"speedup_low": 0.9 * ratio, "speedup_high": 1.1 * ratio}


def cells(table):
    """The cells of a table in Markdown, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("budgets")
    recipe = dataclasses.replace(RECIPES["digits"], **SMALL)
    request = Request("lenet-300-100", "digits", recipe, data_dir=str(root))
    return train(request, load_dataset("digits", root, 28), root / "run"), root / "run"


def test_a_run_is_pruned_by_every_budget_and_only_read(finished, monkeypatch, tmp_path):
    summary, run = finished
    monkeypatch.setattr(budgets, "SPEEDUPS", (2.0, 1e6))
    monkeypatch.setattr(budgets, "BATCH_SIZES", (1,))
    monkeypatch.setattr(budgets, "INCREASE", 100.0)
    seen = []

    def bench(saved, *options, batch_sizes=(1,)):
        seen.append((saved.name, json.loads((saved / "units.json").read_text())))
        return [latency(size, 2.0, 1.0) for size in batch_sizes]

    def benchmark(dense, pruned, x, **_):
        found = [sum(p.numel() for p in net.parameters()) for net in (dense, pruned)]
        ratio = found[0] / found[1]
        row = Latency("cpu", 1, 1, found[0], found[1], ratio, 0.0, None, "eager", ratio, ratio)
        return Comparison(1, 1, *found, (row,))

    monkeypatch.setattr(budgets, "bench", bench)
    monkeypatch.setattr(speedup, "benchmark", benchmark)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    entry = budgets.measured(run, parts=["budgets", "network"], seconds=0.05)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    reached, refused, of_error = entry["budgets"]
    assert 2.0 <= reached["found"]["speedup_low"] < 2.3 and reached["compared"] > 3
    assert "1e+06 cannot be met" in refused["refusal"] and "later" not in refused
    # Any error is at most 100 points over the dense one: the smallest network has one unit a gate.
    assert set(of_error["units"].values()) == {1} and of_error["macs_ratio"] > 100
    assert of_error["validation_error"]["dense"] == summary.validation_error.dense
    # What is measured in a new process is the network that the budget has found.
    names = [name for name, _ in seen]
    assert names == ["pruned-speedup-2-batch-1", "pruned-error", "pruned"]
    for (_, units), row in zip(seen, (reached, of_error), strict=False):
        assert {name: len(unit["kept"]) for name, unit in units.items()} == row["units"]
    profile = entry["network"]["profile"]
    assert profile["dense"]["macs"] == {"fc1": 235_200, "fc2": 30_000, "fc3": 1_000}
    assert sum(profile["pruned"]["macs"].values()) == summary.macs.pruned
    json.dumps(entry)
    monkeypatch.setattr(budget_tables, "DIRECTORY", tmp_path)
    write_json(tmp_path / "run.json", entry)
    first, second = cells(budget_tables.speedups())
    assert (
        first[:3] == ["LeNet-300-100 on digits, `run`", "2x", "1"]
        and first[4] == "2.00x (1.80 to 2.20)"
    )
    assert second[3].startswith("refused: ") and second[3].endswith("x is the largest")
    (row,) = cells(budget_tables.error_budgets())
    assert row[4].endswith("x") and row[6] == "2.00x"
    assert [line[0] for line in cells(budget_tables.layers("run", "1"))][-1] == "whole"


def test_parts_are_kept_that_were_measured_in_the_same_way(monkeypatch, tmp_path, capsys):
    head = {"command": "train", "machine": "m", "versions": {"torch": "2"}, "governor": None}

    def measured(run, data_dir, parts, seconds):
        return {**head, **dict.fromkeys(parts, seconds)}

    def measure(*parts, seconds=1):
        budgets.main([str(tmp_path / "run"), "--seconds", str(seconds), "--parts", *parts])

    monkeypatch.setattr(budgets, "DIRECTORY", tmp_path)
    monkeypatch.setattr(budgets, "measured", measured)
    monkeypatch.setattr(budgets, "_described", lambda run: head)
    measure("int8")
    measure("network", seconds=2)
    record = tmp_path / "run.json"
    assert json.loads(record.read_text()) == {**head, "int8": 1, "network": 2}
    for name, value in {
        "command": "train --seed 1", "machine": "other", "versions": {}, "governor": "performance",
    }.items():  # fmt: skip
        head |= {name: value}
        before = record.read_text()
        with pytest.raises(SystemExit):
            measure("network", seconds=3)
        words = f"run.json has int8 with other values of {name}; measure these parts in the same"
        assert words in capsys.readouterr().err and record.read_text() == before
        measure("network", "int8")
        assert json.loads(record.read_text()) == {**head, "network": 1, "int8": 1}


def test_the_profile_is_of_the_network_of_the_run(monkeypatch, tmp_path):
    settings = {"in_channels": 3, "num_classes": 7}
    save(LeNet5(**settings), tmp_path / "pruned", LeNet5, settings, input_shape=(3, 28, 28))
    request = Request("lenet5", "digits", RECIPES["digits"])
    write_json(tmp_path / "recipe.json", request.to_dict())
    monkeypatch.setattr(budgets, "BATCH_SIZES", (1,))
    monkeypatch.setattr(budgets, "bench", lambda *_, **__: [])
    data = SimpleNamespace(image_shape=(3, 28, 28))
    profile = budgets.Measurement(tmp_path, data, 0.01).network()["profile"]
    macs = profile["dense"]["macs"]
    assert macs["conv1"] == 3 * 20 * 5**2 * 24**2 and macs["fc2"] == 500 * 7
    assert macs == profile["pruned"]["macs"]


def test_the_command_names_the_settings_that_differ():
    recipe = RECIPES["lenet5-small"].replace(cost="latency", holdout=5_000)
    words = "pyro-sbp train --arch lenet5 --dataset mnist --recipe lenet5-small "
    found = command(Request("lenet5", "mnist", recipe, seed=3), changed=True)
    assert found == words + "--set holdout=5000 --set 'cost=\"latency\"' --seed 3"
    scaled = RECIPES["lenet5-small"].replace(kl_scale={"conv1": 12.0, "fc1": 0.5})
    found = command(Request("lenet5", "mnist", scaled), changed=True)
    assert found == words + "--set 'kl_scale={conv1 = 12.0, fc1 = 0.5}' --seed 0"
    with pytest.raises(ValueError, match="the recipe 'mine' is not that of"):
        command(Request("lenet5", "mnist", recipe.replace(name="mine")), changed=True)


def test_the_time_of_a_layer_is_that_of_its_call():
    class Sleeps(torch.nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            time.sleep(self.seconds)
            return x

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = Sleeps(0.02)
            self.part = torch.nn.Sequential(Sleeps(0.03))
            # As `shrink` leaves a layer that reads some of the features.
            select = torch.nn.Module()
            select.select, select.layer = Select(torch.arange(3)), Sleeps(0.05)
            select.forward = lambda x: select.layer(select.select(x))
            self.fc1 = select

        def forward(self, x):
            time.sleep(0.1)
            return self.fc1(self.part(self.twice(self.twice(x))))

    net = Net()
    found = budgets.time_by_layer(net, (3,), 2, seconds=0.1)
    assert list(found) == ["twice", "part.0", "fc1", "other", "whole"]
    for name, milliseconds in {"twice": 40, "part.0": 30, "fc1": 50, "other": 100}.items():
        assert found[name] >= milliseconds
    assert found["whole"] >= 220 and not net.twice._forward_hooks


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Records of one network, with MACs and with latency as the cost."""
    monkeypatch.setattr(budget_tables, "DIRECTORY", tmp_path)
    error = {"dense": 0.7, "mean": 0.8, "pruned": 0.9, "finetuned": 0.75}
    entry = {
        "run": "a", "arch": "lenet5", "dataset": "mnist", "recipe": "r", "seed": 0, "cost": "macs",
        "cost_batch_size": 128, "command": "pyro-sbp train", "error": error, "macs_ratio": 10.0,
        "units": {"conv1": 3, "fc1": 9}, "versions": {"torch": "2"}, "machine": "m",
    }  # fmt: skip
    both = {"latencies": [latency(1, 0.4, 0.2), latency(128, 8.0, 1.0)]}
    write_json(tmp_path / "a.json", {**entry, "network": both})
    eager = [{**x, **BYTES, "pruned_error": 0.75} for x in both["latencies"]]
    others = [
        {**latency(size, 4.0, ms, runtime), **BYTES, "pruned_error": 0.75}
        for runtime, times in {"onnxruntime": (0.1, 0.8), "int8": (0.05, 0.6)}.items()
        for size, ms in zip((1, 128), times, strict=True)
    ]
    forms = {"round-to-auto": {"multiple": 4, "latencies": both["latencies"]}}
    write_json(
        tmp_path / "b.json",
        {
            **{**entry, "cost": "latency", "run": "b"},
            "network": both,
            "int8": eager + others,
            "variants": forms,
            "compiled": [latency(1, 0.3, 0.1), latency(128, 6.0, 0.5)],
        },
    )


BYTES = {"dense_file_bytes": 1_724_000, "pruned_file_bytes": 80_000, "int8_file_bytes": 30_000}
BYTES |= {"int8_error": 0.8, "same_class": 99.5}


def test_speedups_are_compared_with_the_ratio_of_macs_and_with_the_floor(records):
    first, second, *others = cells(budget_tables.costs())
    assert first[:4] == ["LeNet-5 on MNIST, `a`", "0.70 to 0.75", "3-9", "10.00x"]
    assert first[4:] == ["eager", "1", "2.00x (1.80 to 2.20)", "0.20", "4.00x"]
    assert second == [*[""] * 4, "eager", "128", "8.00x (7.20 to 8.80)", "0.80", "16.00x"]
    assert others == [["LeNet-5 on MNIST, `b`", *first[1:]], second]


def test_int8_stands_beside_float32(records):
    rows = cells(budget_tables.int8())
    assert rows[0][0] == "LeNet-5 on MNIST, `b`"
    assert [row[1:] for row in rows] == [
        ["dense, eager", "0.70", "1,724.0", "0.400", "8.000"],
        ["dense, ONNX Runtime", "0.70", "1,724.0", "4.000", "4.000"],
        ["pruned, eager", "0.75", "80.0", "0.200", "1.000"],
        ["pruned, ONNX Runtime", "0.75", "80.0", "0.100", "0.800"],
        ["pruned, ONNX Runtime, int8", "0.80", "30.0", "0.050", "0.600"],
    ]


def test_forms_of_a_network_have_a_row_each(records):
    rows = cells(budget_tables.variants())
    rounded = "`--round-to auto` (multiples of 4)"
    assert [row[1] for row in rows] == ["eager", rounded, "`torch.compile`"]
    assert [row[3] for row in rows][::2] == ["8.000 to 1.000, 8.00x", "6.000 to 0.500, 12.00x"]


def test_the_commands_are_below_the_tables(records):
    assert budget_tables.commands().splitlines() == [
        "- `a`: `pyro-sbp train`; torch 2; m",
        "- `b`: `pyro-sbp train`; torch 2; m",
    ]


def test_a_table_without_records_is_refused(records, tmp_path):
    with pytest.raises(RequestError, match=r"no record in .* has the part 'budgets'"):
        budget_tables.speedups()
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(RequestError, match=r"a.json is not a record of budgets"):
        budget_tables.costs()
