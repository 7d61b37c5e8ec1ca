"""The result of a run."""

import torch
from torch import nn

from pyro_sbp.deployment import saving
from pyro_sbp.training.result import _file_size


def normed():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def test_the_file_of_the_dense_network_has_the_size_of_a_saved_one(tmp_path):
    saving.save(normed(), tmp_path / "net", constructor=normed)
    size = (tmp_path / "net" / "model.safetensors").stat().st_size
    assert _file_size(normed()) == _file_size(normed().to(torch.float64)) == size
