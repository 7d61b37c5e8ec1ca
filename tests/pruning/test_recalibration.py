"""recalibrate_batch_norm: statistics are those of the batches, and nothing else changes."""

import pytest
import torch
from torch import nn

from pyro_sbp.pruning.recalibration import recalibrate_batch_norm


def test_statistics_are_the_mean_over_the_batches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net.train()
    net[3].eval()
    batches = [torch.randn(20, 3) + k for k in range(3)]
    weights = {name: value.clone() for name, value in net.named_parameters()}
    recalibrate_batch_norm(net, batches)
    hidden = [net[0](x).detach() for x in batches]
    torch.testing.assert_close(
        net[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0)
    )
    torch.testing.assert_close(net[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert net.training and net[1].training and not net[3].training and net[1].momentum == 0.1
    assert all(torch.equal(weights[name], value) for name, value in net.named_parameters())


def test_a_network_without_batch_norm_takes_no_batch():
    def batches():
        raise AssertionError("taken")
        yield

    recalibrate_batch_norm(nn.Linear(3, 2), batches())


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        recalibrate_batch_norm(nn.BatchNorm1d(3), [])
