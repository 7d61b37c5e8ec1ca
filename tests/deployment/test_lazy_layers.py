"""Networks whose constructors build lazy layers are pruned, saved and loaded."""

import torch
from torch import nn

import pyro_sbp as sbp


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d()
        self.up, self.fc1, self.fc2 = (
            nn.LazyConvTranspose2d(5, 2),
            nn.LazyLinear(8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        h = self.up(self.norm(self.conv(x)).relu()).relu()
        return self.fc2(self.fc1(h.flatten(1)).relu())


def test_lazy_layers_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    net, x = Lazy(), torch.rand(2, 2, 5, 5)
    gates = sbp.find_gates(net, x, input_features=["fc1"])
    assert [gate.name for gate in gates] == ["conv", "up", "fc1_input", "fc1"]
    theta = {gate.name: (torch.arange(gate.size) % 3 > 0).float() for gate in gates}
    small = sbp.shrink(net, gates, theta, x).eval()
    sbp.save(small, tmp_path / "net", constructor=Lazy)
    loaded = sbp.load(tmp_path / "net", constructor=Lazy)
    assert type(loaded.conv) is nn.Conv2d and loaded.conv.out_channels == 4
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))
