"""pyro-sbp prune, in process."""

import json

import pytest
from helpers import run, train_quickly


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train_quickly("sbp", tmp_path_factory.mktemp("runs"))[0]


def test_nobody_is_told_of_a_threshold_that_nobody_gave(finished):
    result = run("prune", finished, "--macs-ratio", "2000")
    assert result.exit_code == 0, result.output
    assert "all units of fc1 are too weak for the budget: only the best is kept\n" in result.stdout
    assert "threshold" not in result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give --criterion, --threshold, --macs-ratio, --round-to or --min-units"),
        (["--threshold", "1", "--macs-ratio", "2"], "not both"),
        (["--threshold", "-1"], "expected a signal-to-noise ratio >= 0"),
        (["--threshold", "1e9", "--min-units", "0"], "removes every unit of every gate"),
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
