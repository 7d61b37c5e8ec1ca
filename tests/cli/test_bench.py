"""pyro-sbp bench on a network with attention: its floor, and the count of ptflops."""

import json
import sys

import pytest
import torch
from helpers import run

from pyro_sbp.deployment import benchmarking
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
    original = benchmarking.benchmark

    def watched(dense, pruned, example, *, floor, **options):
        seen.update(dense=dense, floor=floor)
        return original(dense, pruned, example, floor=floor, **options)

    monkeypatch.setattr(benchmarking, "benchmark", watched)
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
        "floor_ms", "runtime", "dense_macs", "pruned_macs", "dense_macs_ptflops",
        "pruned_macs_ptflops",
    }  # fmt: skip
    assert (rows[0]["dense_macs"], rows[0]["dense_macs_ptflops"]) == (dense, dense + biases)
    assert json.loads((finished / "bench.json").read_text()) == rows
