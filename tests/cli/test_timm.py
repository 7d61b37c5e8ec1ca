"""Models of timm from the command line: their images, and weights for other classes."""

import json

import pytest
import torch
from helpers import run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def test_a_pretrained_model_of_timm_is_trained_by_its_own_images(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", in_chans=1).state_dict(), tmp_path / "weights.pt")
    args = ("train", "--arch", "timm:resnet10t", "--dataset", "digits", "--device", "cpu")
    args = (*args, "--weights", tmp_path / "weights.pt", "--image-size", "32", "--epochs", "1")
    args = (*args, "--set", "finetune_epochs=0", "--batch-size", "256")
    result = run(*args, "--output-dir", tmp_path / "run")
    assert result.exit_code == 0, result.output
    request = json.loads((tmp_path / "run" / "recipe.json").read_text())
    config = timm.get_pretrained_cfg("resnet10t")
    assert request["image_size"] == 32
    assert request["standardize_by"] == {"mean": list(config.mean), "std": list(config.std)}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (mean,) = summary["standardize"]["mean"]
    assert mean == pytest.approx(sum(config.mean) / 3)
