"""Units that no weight reads are removed, and nothing else changes."""

import pytest
import torch
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.pruning.sparsity import needed_units, prune_weights, shrink_sparse


class Branches(nn.Module):
    """A residual sum, a depthwise, a grouped and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        x = x + self.b(self.depthwise(x)).relu()
        x = self.up(self.grouped(x).relu())
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("share", [0.5, 0.1, 0.02, 0.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_smaller_network_is_that_of_zeros(share, seed):
    torch.manual_seed(seed)
    net, x = Branches().double().eval(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    gates = sbp.find_gates(net, x)
    snr = {n: torch.rand_like(p) for n, p in net.named_parameters() if p.ndim > 1}
    snr = {name.removesuffix(".weight"): value for name, value in snr.items()}
    found = shrink_sparse(net, gates, snr, x, threshold=1 - share)
    with torch.no_grad():
        for name, value in snr.items():
            net.get_parameter(f"{name}.weight").mul_(value >= 1 - share)
        torch.testing.assert_close(found.small(x), net(x), rtol=1e-12, atol=1e-12)
    for name, (kept, total) in found.kept.items():
        assert kept == int(net.get_parameter(f"{name}.weight").count_nonzero())
        assert total == snr[name].numel()
    if share <= 0.02:
        few, many = (sum(p.numel() for p in n.parameters()) for n in (found.small, net))
        assert few < many / 2


def test_what_nobody_reads_goes_with_all_that_it_alone_read():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    gates = sbp.find_gates(net, torch.randn(2, 4), input_features=["0"])
    masks = {name: torch.ones_like(net[int(name)].weight).bool() for name in ("0", "2", "4")}
    masks["4"][:, 1:] = False  # only unit 0 of layer 2 is read
    masks["2"][0, 1:] = False  # which reads unit 0 of layer 0
    masks["0"][0, 2:] = False  # which reads the inputs 0 and 1
    theta = needed_units(net, gates, masks)
    assert theta["2"].tolist() == [1, 0, 0] and theta["0"].tolist() == [1, 0, 0]
    assert theta["0_input"].tolist() == [1, 1, 0, 0]


def test_bad_settings_are_refused():
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 4)
    model = sbp.SparseModel(net, x, num_data=10)
    guide = sbp.AdditiveNormalGuide(model)
    with pytest.raises(ValueError, match="threshold is -1"):
        prune_weights(model, guide, x, threshold=-1.0)
    with pytest.warns(UserWarning, match=r"no weight reaches the threshold 1e\+09"):
        small = prune_weights(model, guide, x, threshold=1e9)
    assert float(small(x).detach().std(0).sum()) == 0  # a constant
