"""Weights from files of other programs: damaged files, and files of other networks."""

import os
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pyro_sbp.deployment.weight_files import load_weights
from pyro_sbp.errors import RequestError

#: How many random damages of each kind of file; PYRO_SBP_DAMAGES=2000 for a long search.
DAMAGES = int(os.environ.get("PYRO_SBP_DAMAGES", "60"))


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 30))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_weights_are_refused_in_one_line(suffix, tmp_path):
    torch.manual_seed(0)
    net, path = convolutional(), tmp_path / f"weights{suffix}"
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    chance = random.Random(0)
    for _ in range(DAMAGES):
        damaged = bytearray(content)
        place = chance.randrange(len(damaged) if chance.random() < 0.5 else 2000)
        if chance.random() < 0.2:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            load_weights(convolutional(), path)
        except RequestError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({1: torch.ones(2)}, "has no state dict"),
        ([torch.ones(2)], "has no state dict"),
        ({"weight": torch.ones(2, 3).int(), "bias": torch.ones(2)}, "has torch.int32 for 'weight'"),
        ({"weight": torch.ones(2, 3) * 1j, "bias": torch.ones(2)}, "has torch.complex64 for"),
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, "weights of another network"),
        (
            {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, torch.nan])},
            "values that are not finite, in 'bias'",
        ),
        (
            {"weight": torch.ones(2, 3) / 0, "bias": torch.ones(2)},
            "values that are not finite, in 'weight'",
        ),
    ],
)
def test_what_is_no_state_dict_is_refused(state, words, tmp_path):
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(RequestError, match=words):
        load_weights(nn.Linear(3, 2), tmp_path / "weights.pt")


def test_the_parameters_of_another_network_are_named(tmp_path):
    state = {"weight": torch.ones(2, 4), "gain": torch.ones(2), "offset": torch.ones(2)}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(RequestError) as raised:
        load_weights(nn.Linear(3, 2), tmp_path / "weights.pt")
    assert str(raised.value).endswith(
        "another network: 'weight' is [2, 4], not [2, 3]; 'bias' is missing; "
        "'gain' (and 1 more) belongs to no layer"
    )


@pytest.mark.filterwarnings("default")
def test_a_last_layer_of_other_classes_keeps_its_initial_values(tmp_path):
    def net(classes):
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, classes))

    torch.manual_seed(0)
    pretrained, fresh = net(9), net(5)
    torch.save(pretrained.state_dict(), tmp_path / "weights.pt")
    before = fresh[2].weight.clone()
    with pytest.warns(UserWarning, match=r"another number of classes than 5 in the layer '2', so"):
        load_weights(fresh, tmp_path / "weights.pt", classes=5)
    assert torch.equal(fresh[0].weight, pretrained[0].weight)
    assert torch.equal(fresh[2].weight, before)
    for classes in (None, 4):  # no layer has four outputs
        with pytest.raises(RequestError, match=r"'2.weight' is \[9, 4\], not \[5, 4\]"):
            load_weights(net(5), tmp_path / "weights.pt", classes=classes)


def test_damaged_metadata_of_a_state_dict_are_refused(tmp_path):
    state = nn.Linear(3, 2).state_dict()
    state._metadata = ["damaged"]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(RequestError, match="weights of another network"):
        load_weights(nn.Linear(3, 2), tmp_path / "weights.pt")
