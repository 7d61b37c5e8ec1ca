"""A ResNet of one's own from the command line, start to end."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import run

from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.deployment import loading

NETWORK = """
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(b)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(b)
        self.short = nn.Conv2d(a, b, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.short(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, 2, 1)
        self.blocks = nn.Sequential(Block(12, 12, 1), Block(12, 24, 2), Block(24, 24, 1))
        self.head = nn.Linear(24, num_classes)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))
"""
RECIPE = """
dense_epochs = 4
epochs = 7
finetune_epochs = 1
batch_size = 32
learning_rate = 3e-3
noise_learning_rate = 0.1
init_log_scale = -1.0
kl_scale = 6.0
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    (root / "own_resnet.py").write_text(NETWORK)
    (root / "recipe.toml").write_text(RECIPE)
    sys.path.insert(0, str(root))
    args = ("--arch", "own_resnet:ResNet", "--dataset", "digits", "--recipe", root / "recipe.toml")
    result = run("train", *args, "--output-dir", root / "run", "--device", "cpu")
    yield root, result, args
    sys.path.remove(str(root))


def test_a_residual_network_gets_smaller_and_still_knows_digits(finished):
    root, result, _ = finished
    assert result.exit_code == 0, result.output
    summary = json.loads((root / "run" / "summary.json").read_text())
    assert [unit["gate"] for unit in summary["units"]] == [
        "stem", "blocks.0.conv1", "blocks.1.short", "blocks.1.conv1", "blocks.2.conv1",
    ]  # fmt: skip
    assert summary["macs"]["ratio"] > 1.3
    assert summary["error"]["finetuned"] < 10
    assert summary["equivalence"]["max_rel_diff_float64"] <= 1e-10
    kept = json.loads((root / "run" / "pruned" / "units.json").read_text())
    from own_resnet import ResNet

    net = loading.load(root / "run" / "pruned", ResNet)
    assert net.stem.out_channels == len(kept["stem"]["kept"]) + len(kept["stem"]["zeroed"])
    x, y = load_dataset("digits", root).test.batch(slice(None))
    error = 100 * float((net(x).argmax(1) != y).float().mean())
    assert error == pytest.approx(summary["error"]["finetuned"], abs=1e-4)


@pytest.mark.slow
def test_it_loads_to_the_same_outputs_where_pyro_cannot_be_imported(finished):
    root, _, _ = finished
    from own_resnet import ResNet

    x, _ = load_dataset("digits", root).test.batch(slice(0, 4))
    torch.save((x, loading.load(root / "run" / "pruned", ResNet)(x).detach()), root / "io.pt")
    program = (
        "import sys; sys.modules['pyro'] = None\n"
        "import torch, pyro_sbp\n"
        "from own_resnet import ResNet\n"
        "x, y = torch.load('io.pt')\n"
        "found = pyro_sbp.load('run/pruned', constructor=ResNet)(x)\n"
        "torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)  # with other threads\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


def test_trained_weights_start_a_run(finished):
    root, _, args = finished
    from own_resnet import ResNet

    torch.manual_seed(5)
    torch.save(ResNet().state_dict(), root / "weights.pt")
    quick = ("--epochs", 1, "--weights", root / "weights.pt", "--device", "cpu")
    result = run("train", *args, *quick, "--output-dir", root / "started")
    assert result.exit_code == 0, result.output
    lines = (root / "started" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["phase"] for line in lines] == ["gated", "finetuned"]


def test_wrong_weights_are_refused(finished, tmp_path):
    _, _, args = finished
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.safetensors").write_text("no")
    for name, words in (
        ("missing.pt", "there is no file"),
        ("other.pt", "has the weights of another network"),
        ("list.pt", "has no state dict"),
        ("text.safetensors", "cannot be read as weights"),
    ):
        options = ("--weights", tmp_path / name, "--output-dir", tmp_path / "run", "--threads", 1)
        result = run("train", *args, *options, "--device", "cpu")
        assert result.exit_code == 2 and words in result.stderr, result.output
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()
