"""Run directories: what a finished and an unfinished one hold, and damaged files."""

import json

import pytest

from pyro_sbp.errors import RequestError
from pyro_sbp.recipes.named import RECIPES
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.runs import Run, read_request, read_saved_network, read_threads
from pyro_sbp.training.summary import Differences, Errors, GateUnits, Size, Summary

REQUEST = Request("lenet5", "mnist", RECIPES["lenet5"], seed=3)
LINE = {"phase": "dense", "epoch": 1, "loss": 0.5, "nll": 0.5, "kl": 0.0, "error": 3.0,
        "units": {"conv1": 20}, "seconds": 1.0}  # fmt: skip
ROW = {"device": "cpu", "threads": 1, "batch_size": 1, "dense_ms": 2.0, "pruned_ms": 1.0,
       "speedup": 2.0, "spread": 0.0}  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    """A finished run."""
    summary = Summary(
        arch="lenet5", dataset="mnist", method="sbp", seed=3, epochs=1, device="cpu",
        train_seconds=1.0, error=Errors(pruned=2.0, finetuned=1.5),
        units=(GateUnits("conv1", 3, 20),), macs=Size(1000, 250, 4.0),
        parameters=Size(10, 5, 2.0), equivalence=Differences(0.0, 0.0),
    )  # fmt: skip
    for name, value in (
        ("recipe.json", {**REQUEST.to_dict(), "threads": 2, "machine": "a machine"}),
        ("summary.json", summary.to_dict()),
        ("bench.json", [ROW, {**ROW, "runtime": "compile"}]),
        ("pruned/network.json", {"kwargs": {"classes": 10}, "input_shape": [1, 28, 28]}),
        ("pruned/units.json", {"conv1": {"total": 20, "kept": [0, 5, 7], "zeroed": []}}),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(LINE)}\n" * 2)
    return tmp_path


def test_a_finished_run_has_all_of_its_files(directory):
    run = Run.read(directory)
    assert run.request == REQUEST and run.asked["machine"] == "a machine"
    assert (run.error, run.macs_ratio, run.name) == (1.5, 4.0, directory.name)
    assert run.metrics == [LINE, LINE]
    assert run.units["conv1"]["kept"] == [0, 5, 7]
    assert run.network == read_saved_network(directory / "pruned")
    # Rows that name no runtime are of an earlier version, which had only one.
    assert [row["runtime"] for row in run.bench] == ["eager", "compile"]


def test_before_the_summary_the_network_is_not_final(directory):
    (directory / "summary.json").unlink()
    run = Run.read(directory)
    assert (run.summary, run.network, run.units, run.error, run.macs_ratio) == (None,) * 5
    for name in ("metrics.jsonl", "bench.json"):
        (directory / name).unlink()
    run = Run.read(directory)
    assert run.metrics == [] and run.bench is None


@pytest.mark.parametrize(("value", "expected"), [(2, 2), (None, None), ("2", None), (0, None)])
def test_the_threads_of_a_run(directory, value, expected):
    (directory / "recipe.json").write_text(json.dumps({"threads": value}))
    assert read_threads(directory) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.json", "["),
        ("recipe.json", "[]"),
        ("recipe.json", "{}"),
        ("metrics.jsonl", '{"phase": "dense"}'),
        ("metrics.jsonl", '{"pha'),
        ("bench.json", json.dumps([{**ROW, "dense_ms": 0}])),
        ("pruned/units.json", '{"conv1": {"total": 20, "kept": [-1], "zeroed": []}}'),
        ("pruned/network.json", "[" * 100_000),
    ],
)
def test_a_damaged_file_is_named_in_one_line(directory, name, text):
    (directory / name).write_text(text)
    with pytest.raises(RequestError, match=f"{name} is damaged: ") as caught:
        Run.read(directory)
    assert "\n" not in str(caught.value)


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"is not a run directory: it has no recipe\.json"):
        read_request(tmp_path)
    with pytest.raises(RequestError, match=r"has no saved network: network\.json is missing"):
        read_saved_network(tmp_path)
