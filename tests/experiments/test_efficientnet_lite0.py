"""Weights under the names of another network with the same shapes in order."""

import pytest
import torch
from torch import nn

from pyro_sbp.experiments.efficientnet_lite0 import KINDS, in_order


def network(prefix):
    layers = {f"{prefix}conv": nn.Conv2d(3, 4, 3), f"{prefix}bn": nn.BatchNorm2d(4)}
    return nn.ModuleDict(layers)


def test_tensors_get_the_names_of_the_other_network():
    old, new = network("_"), network("")
    new.load_state_dict(in_order(old.state_dict(), new.state_dict()))
    assert torch.equal(new["conv"].weight, old["_conv"].weight)


def test_tensors_of_other_shapes_are_refused():
    own = network("").state_dict()
    with pytest.raises(ValueError, match="there are 5 tensors, not 7"):
        in_order(dict(list(network("_").state_dict().items())[2:]), own)
    other = {"a.weight": torch.ones(4, 3, 3, 2), **dict(list(own.items())[1:])}
    with pytest.raises(ValueError, match=r"'a.weight' is \[4, 3, 3, 2\], and 'conv.weight'"):
        in_order(other, own)


def test_no_class_of_imagenet_counts_twice():
    counted = [i for kinds in KINDS.values() for part in kinds for i in part]
    assert len(counted) == len(set(counted)) and max(counted) < 1000
