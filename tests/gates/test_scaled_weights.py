"""Weights that are multiplied by a scale in every call are readers and writers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exact_cuts import check
from torch import Tensor, nn

POINTS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def scale_of(kind: str, weight: Tensor) -> nn.Parameter | float:
    rows, columns, *kernel = weight.shape
    ones = [1] * len(kernel)
    shapes = {"one": [], "row": [rows, 1, *ones], "column": [columns, *ones], "mask": weight.shape}
    return 0.3 if kind == "number" else nn.Parameter(torch.rand(shapes[kind]) + 0.5)


class Scaled(nn.Conv2d):
    """A convolution with a learned scale."""

    def __init__(self, *sizes: int, kind: str) -> None:
        super().__init__(*sizes)
        self.scale = scale_of(kind, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias)


class ScaledProduct(nn.Module):
    """The same for a product with a parameter."""

    def __init__(self, columns: int, rows: int, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))
        self.scale = scale_of(kind, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.scale * self.weight).T


class Equalized(nn.Linear):
    """The equalized learning rate, with the factor computed in every call."""

    power = -0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight.shape[1] ** self.power, self.bias)


class Averaging(Equalized):
    power = -1


@pytest.mark.parametrize("kind", ["number", "one", "row", "column", "mask"])
def test_scales_are_cut_with_the_units(kind):
    torch.manual_seed(0)
    layers = Scaled(3, 8, 3, kind=kind), nn.ReLU(), Scaled(8, 6, 2, kind=kind), nn.ReLU()
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(54, 2))
    small = check(net, IMAGES, **{"0": 8, "2": 6})
    assert small[0].weight.shape == (5, 3, 3, 3) and small[2].weight.shape == (4, 5, 2, 2)
    shapes = {"row": (4, 1, 1, 1), "column": (5, 1, 1), "mask": (4, 5, 2, 2)}
    if kind in shapes:
        assert small[2].scale.shape == shapes[kind]


@pytest.mark.parametrize("kind", ["row", "column"])
def test_scales_of_products(kind):
    torch.manual_seed(0)
    net = nn.Sequential(ScaledProduct(5, 8, kind), nn.ReLU(), ScaledProduct(8, 3, kind))
    small = check(net, POINTS, **{"0": 8})
    assert small[2].scale.shape == ((3, 1) if kind == "row" else (5,))


@pytest.mark.parametrize("layer", [Equalized, Averaging])
def test_factors_that_depend_on_the_number_of_columns(layer):
    torch.manual_seed(0)
    net = nn.Sequential(layer(5, 9), nn.ReLU(), layer(9, 6), nn.ReLU(), layer(6, 3))
    small = check(net, POINTS, **{"0": 9, "2": 6})
    assert small[2].weight.shape == (4, 6)


class Concatenated(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 8), nn.Linear(5, 6), layer(14, 3)

    def forward(self, x):
        return self.last(torch.cat([self.a(x).relu(), self.b(x).relu()], 1))


@pytest.mark.parametrize("layer", [Equalized, Averaging])
def test_such_a_factor_of_a_layer_that_reads_two_gates(layer):
    torch.manual_seed(0)
    small = check(Concatenated(layer), POINTS, a=8, b=6)
    assert small.last.in_features < 14
