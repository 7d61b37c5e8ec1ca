"""Summaries: what is written is read, what is unknown is left out, and the rows of tables."""

import json

import pytest

from pyro_sbp.errors import RequestError
from pyro_sbp.training.summary import (
    Calibration,
    Differences,
    Errors,
    GateUnits,
    LayerWeights,
    Size,
    Summary,
    WeightsLeft,
    percent,
)

SUMMARY = Summary(
    arch="lenet5",
    dataset="mnist",
    method="sbp",
    seed=3,
    epochs=5,
    device="cpu",
    train_seconds=1.5,
    error=Errors(dense=1.0, mean=1.25, pruned=2.0),
    units=(GateUnits("conv1", 3, 20, 1),),
    macs=Size(1000, 250, 4.0),
    parameters=Size(3000, 1500, 2.0, nonzero=1400),
    equivalence=Differences(1e-15, 1e-7),
)


def test_what_is_written_is_read_and_what_is_not_there_is_not_written(tmp_path):
    values = SUMMARY.to_dict()
    assert not {"validation_error", "calibration", "weights", "files", "threads"} & set(values)
    assert "nonzero" not in values["macs"] and values["parameters"]["nonzero"] == 1400
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({**values, "of a later version": 1}))
    assert Summary.read(path) == SUMMARY


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"error": {"pruned": 101.0}}, "error pruned"),
        ({"train_seconds": -1.0}, "train_seconds"),
        ({"units": [{"gate": "conv1", "kept": 1.5, "total": 2}]}, "kept"),
        ({"macs": {"dense": 1, "pruned": 1, "ratio": float("nan")}}, "macs ratio"),
    ],
)
def test_a_damaged_value_is_named_in_one_line(tmp_path, change, words):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({**SUMMARY.to_dict(), **change}))
    with pytest.raises(RequestError, match=f"summary.json is damaged: .*{words}") as caught:
        Summary.read(path)
    assert "\n" not in str(caught.value)


def test_the_last_error_is_that_of_the_returned_network():
    assert SUMMARY.error.last == 2.0
    assert Errors(pruned=2.0, finetuned=1.5).last == 1.5
    assert Errors(dense=1.0).last is None


def test_the_rows_of_the_tables():
    assert list(SUMMARY.errors()) == ["test"]
    head, rows = SUMMARY.error_table()
    assert head == ("network", "test error, %")
    assert rows[-2:] == [("pruned", "2.00"), ("fine-tuned", "-")]
    assert SUMMARY.unit_rows() == [("conv1", 3, 20, 1)]
    assert SUMMARY.size_rows() == [
        ("MACs", "1,000", "250", "4.00x"),
        ("parameters", "3,000", "1,500", "2.00x"),
    ]
    assert percent(0.0) == "0.00" and percent(None) == "-"


def test_calibration_is_read_and_stands_beside_the_errors():
    calibration = {"test": {"pruned": {"nll": 0.25, "ece": 1.5}}}
    values = {**SUMMARY.to_dict(), "validation_error": {"pruned": 3.0}, "calibration": calibration}
    summary = Summary.from_dict(values)
    assert summary.calibration == {"test": {"pruned": Calibration(0.25, 1.5)}}
    assert summary.to_dict()["calibration"] == calibration
    head, rows = summary.error_table()
    # Of the validation images no calibration was measured.
    assert head == ("network", "test error, %", "NLL", "ECE, %", "validation error, %")
    assert rows[0] == ("dense", "1.00", "-", "-", "-")
    assert rows[2] == ("pruned", "2.00", "0.2500", "1.50", "3.00")


def test_weights_in_words_and_rows():
    weights = WeightsLeft((LayerWeights("fc1", 10, 1234),), 10, 1234, 123.4)
    assert weights.in_words == "123.4 times fewer weights"
    assert weights.rows() == [("fc1", "10", "1,234"), ("all", "10", "1,234")]
    assert WeightsLeft((), 0, 1234, None).in_words == "no weight is left"
