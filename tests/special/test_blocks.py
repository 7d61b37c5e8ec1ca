"""Functions that are evaluated in blocks."""

import pytest
import torch

from pyro_sbp.distributions import TruncatedNormal
from pyro_sbp.special import blocks


def test_blocks_give_what_the_whole_gives(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    x = torch.arange(50.0).view(5, 10)
    low = torch.full((1,), 2.0)
    sizes = []

    def function(x, low):
        sizes.append(x.numel())
        return x - low, x * low

    found = blocks.in_blocks(function, x, low)
    assert sizes == [16, 16, 16, 2]
    for ours, expected in zip(found, (x - 2, 2 * x), strict=True):
        assert ours.shape == x.shape and torch.equal(ours, expected)


def test_copied_parameters_are_not_evaluated_for_every_copy(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    shapes = []

    def function(x, loc):
        shapes.append(tuple(loc.shape))
        return (x + loc,)

    (found,) = blocks.in_blocks(function, torch.zeros(20, 4), torch.ones(4))
    assert shapes == [(4,)] and found.shape == (20, 4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning")
def test_traces_of_a_moment_agree():
    def mean(loc):
        return TruncatedNormal(loc, 1.0, -1.0, 1.0, validate_args=False).mean

    traced = torch.jit.trace(mean, torch.zeros(3))  # which traces twice and compares
    torch.testing.assert_close(traced(torch.ones(3)), mean(torch.ones(3)))
