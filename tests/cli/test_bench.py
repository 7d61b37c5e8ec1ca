"""pyro-sbp bench on a network with attention: its floor, and the count of ptflops."""

import json
import sys

import pytest
import torch
from helpers import run

from pyro_sbp import machine
from pyro_sbp.cli import bench_run
from pyro_sbp.gates.attention import Attention

NETWORK = """
import torch
from torch import nn


class Rows(nn.Module):
    '''An encoder over the rows of an image.'''

    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.head(self.block(self.stem(x.flatten(1, 2))).mean(1))
"""
RECIPE = """
dense_epochs = 1
epochs = 1
batch_size = 64
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    (root / "own_rows.py").write_text(NETWORK)
    (root / "recipe.toml").write_text(RECIPE)
    sys.path.insert(0, str(root))
    args = ("--arch", "own_rows:Rows", "--dataset", "digits", "--recipe", root / "recipe.toml")
    result = run("train", *args, "--output-dir", root / "run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    yield root / "run"
    sys.path.remove(str(root))


def test_the_floor_has_one_head_and_the_dense_network_is_the_users_own(finished, monkeypatch):
    seen = {}
    original = bench_run.benchmark

    def watched(dense, pruned, example, *, floor, **options):
        seen.update(dense=dense, floor=floor)
        return original(dense, pruned, example, floor=floor, **options)

    monkeypatch.setattr(bench_run, "benchmark", watched)
    args = ("bench", finished, "--seconds", "0.01", "--threads", "1", "--batch-size", "1")
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert type(seen["dense"].block.self_attn) is torch.nn.MultiheadAttention
    attention = seen["floor"].block.self_attn
    assert isinstance(attention, Attention)
    assert attention.query.out_features == attention.value.out_features == 4  # of 16: one head
    assert seen["floor"].block.linear1.out_features == 1


def test_the_count_of_ptflops_stands_beside_ours(finished):
    args = ("bench", finished, "--seconds", "0.01", "--threads", "1", "--batch-size", "1")
    result = run(*args)
    assert result.exit_code == 0, result.output
    dense = 8 * 8 * 16 + 8 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 8 * 8 * 16 + 16 * 10
    (ours,) = (line for line in result.stdout.splitlines() if line.startswith("MACs "))
    assert ours.startswith(f"MACs {dense:,} -> ")
    (theirs,) = (line for line in result.stdout.splitlines() if line.startswith("ptflops: "))
    # With the biases of the stem, the four products of attention, the MLP and the head.
    biases = 8 * (16 + 3 * 16 + 16 + 24 + 16) + 10
    assert theirs.startswith(f"ptflops: MACs {dense + biases:,} -> ")
    rows = json.loads(run(*args, "--json").stdout)
    assert isinstance(rows, list) and set(rows[0]) == {
        "device", "threads", "batch_size", "dense_ms", "pruned_ms", "speedup", "spread",
        "floor_ms", "runtime", "speedup_low", "speedup_high", "confidence", "blocks", "governor",
        "dense_macs", "pruned_macs", "dense_macs_ptflops",
        "pruned_macs_ptflops", "dense_file_bytes", "pruned_file_bytes", "dense_peak_bytes",
        "pruned_peak_bytes",
    }  # fmt: skip
    assert (rows[0]["dense_macs"], rows[0]["dense_macs_ptflops"]) == (dense, dense + biases)
    assert json.loads((finished / "bench.json").read_text()) == rows


def test_what_is_named_twice_is_measured_once(finished):
    options = ("--threads", "1", "--batch-size", "2", "--batch-size", "1", "--runtime", "eager")
    result = run("bench", finished, "--seconds", "0.01", "--json", *options, *options)
    assert result.exit_code == 0, result.output
    rows = [(row["threads"], row["batch_size"]) for row in json.loads(result.stdout)]
    assert rows == [(1, 2), (1, 1)]


def test_tables_as_markdown_with_file_and_memory(finished):
    args = ("bench", finished, "--seconds", "0.01", "--threads", "1", "--batch-size", "1")
    result = run(*args, "--markdown")
    assert result.exit_code == 0, result.output
    head, rule, row, *_ = result.stdout.splitlines()
    assert head.startswith("| device | threads | batch |") and rule.startswith("| --- | ---: |")
    assert head.count("|") == rule.count("|") == row.count("|")
    assert "\nfile " in result.stdout and "peak memory of a call with one image" in result.stdout
    (found,) = json.loads(run(*args, "--json").stdout)
    (file,) = (finished / "pruned").glob("*.safetensors")
    assert found["pruned_file_bytes"] == file.stat().st_size
    parameters = sum(p.numel() for p in sys.modules["own_rows"].Rows().parameters())
    assert found["dense_peak_bytes"] > 4 * (parameters + 64) and found["pruned_peak_bytes"] > 4 * 64
    refused = run(*args, "--json", "--markdown")
    assert refused.exit_code == 2 and "give one of --json and --markdown" in refused.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_int8_is_shown_with_its_error(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from helpers import train_quickly

    directory = train_quickly("sbp", tmp_path)[0]
    args = ("bench", directory, "--seconds", "0.01", "--threads", "1", "--batch-size", "2")
    result = run(*args, "--runtime", "int8", "--channels-last")
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines() if line}
    summary = json.loads((directory / "summary.json").read_text())
    last = summary["error"]["finetuned"]
    last = summary["error"]["pruned"] if last is None else last
    pruned, quantized = lines["pruned"], lines["pruned, int8"]
    assert float(pruned[1]) == pytest.approx(last, abs=0.3)  # one image of the test set
    assert float(quantized[3]) > 90  # % of the images have the same class
    assert float(quantized[4].replace(",", "")) < float(pruned[3].replace(",", ""))
    rows = json.loads((directory / "bench.json").read_text())
    for row in rows:
        assert f"{row['int8_error']:.2f}" == quantized[2]
        assert f"{row['pruned_error']:.2f}" == pruned[1]
        assert row["int8_file_bytes"] < row["pruned_file_bytes"]


def test_the_interval_and_the_governor_are_in_text_json_and_markdown(
    finished, monkeypatch, tmp_path
):
    args = ("bench", finished, "--seconds", "0.05", "--threads", "1", "--batch-size", "1")
    monkeypatch.setattr(machine, "CORES", tmp_path)
    for flags in ((), ("--markdown",)):
        result = run(*args, *flags)
        assert "95% interval" in result.stdout.splitlines()[0]
        assert "\nCPU governor: not readable\n" in result.stdout
    (row,) = json.loads(run(*args, "--json").stdout)
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert row["confidence"] == 0.95 and row["blocks"] >= 6 and row["governor"] is None
    for core, name in (("cpu0", "powersave"), ("cpu1", "performance")):
        (tmp_path / core / "cpufreq").mkdir(parents=True)
        (tmp_path / core / "cpufreq" / "scaling_governor").write_text(f"{name}\n")
    assert "\nCPU governor: powersave, performance\n" in run(*args).stdout
