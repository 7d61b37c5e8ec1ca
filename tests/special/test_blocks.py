"""Functions that are evaluated in blocks."""

import torch

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
