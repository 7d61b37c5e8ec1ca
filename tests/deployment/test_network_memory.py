"""The memory of networks, against sums of the sizes of their tensors."""

import pytest
import torch
from torch import nn

from pyro_sbp.deployment.memory import file_size, peak_memory


class Again(nn.Module):
    """A layer that is called several times, each time on its own output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 10, bias=False)

    def forward(self, x):
        for _ in range(5):
            x = self.layer(x)
        return x


def dense(inplace):
    layers = nn.Linear(10, 100, bias=False), nn.ReLU(inplace), nn.Linear(100, 5, bias=False)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("net", "floats"),
    [
        # Parameters, the input, and the results that exist at the same time.
        (dense(inplace=False), 1000 + 500 + 80 + 2 * 800),
        (dense(inplace=True), 1000 + 500 + 80 + 800 + 40),
        (Again(), 100 + 80 + 2 * 80),
        (nn.Identity(), 80),
    ],
)
def test_the_peak_is_the_largest_sum_of_tensors_that_exist_at_once(net, floats):
    x = torch.randn(8, 10)
    assert peak_memory(net.eval(), x) == 4 * floats
    assert peak_memory(net.eval(), x) == 4 * floats  # nothing is left of the first call


def test_a_view_needs_no_memory_and_a_shared_parameter_counts_once():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False))
    net[2].weight = net[1].weight
    assert peak_memory(net.eval(), torch.randn(1, 3, 4)) == 4 * (144 + 12 + 12 + 12)


def test_a_file_holds_the_tensors_and_a_header():
    for width in (1, 1000):
        size = file_size(nn.Linear(10, width)) - 4 * 11 * width
        assert 0 < size < 300  # the names and shapes
