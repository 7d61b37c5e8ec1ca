"""The network, the data and the method of a request."""

import dataclasses

import pytest
import torch
from torch import nn

from pyro_sbp.datasets.loading import ImageData
from pyro_sbp.datasets.splits import Split
from pyro_sbp.errors import RequestError
from pyro_sbp.gates.attention import separate_attention
from pyro_sbp.recipes.method_recipes import SBPRecipe
from pyro_sbp.recipes.request import Request
from pyro_sbp.training.devices import launch
from pyro_sbp.training.job import build_network, prepare_data, prepare_job

CPU = torch.device("cpu")


class Narrow(nn.Sequential):
    """A network for 4 x 4 images of three classes."""

    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, num_classes))


class TooFew(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(16, 2))


class Wide(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(99, 3))


class Broken(nn.Module):
    def __init__(self):
        raise OSError("no weights")


def request(net=Narrow, **settings):
    return Request(f"test_job:{net.__name__}", "digits", SBPRecipe(**settings), seed=1)


@pytest.fixture
def data():
    images = torch.randint(256, (40, 1, 4, 4), dtype=torch.uint8)
    split = Split(images, torch.arange(40) % 3)
    return ImageData(split, split, ("a", "b", "c"))


def test_a_network_is_of_its_seed_and_of_the_classes(data):
    first, kwargs = build_network(request(), data)
    second, _ = build_network(request(), data)
    assert kwargs == {"num_classes": 3} and first[-1].out_features == 3
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (TooFew, r"does not return logits \[batch, 3\].* returns \[8, 2\] for 8 images"),
        (Wide, r"the network does not accept images of \[1, 4, 4\]: "),
        (Broken, "the network cannot be built from no arguments: no weights"),
    ],
)
def test_what_does_not_fit_the_images_is_refused(data, net, words):
    with pytest.raises(RequestError, match=words):
        build_network(request(net), data)


def test_the_recipe_says_what_becomes_of_the_data(data):
    assert prepare_data(request(), data, CPU).validation is None
    held = prepare_data(request(holdout=10), data, CPU)
    assert (len(held.train), len(held.validation), len(held.test)) == (30, 10, 40)
    assert prepare_data(request(standardize=True), data, CPU).train.standardization is not None
    given = {"mean": [0.25], "std": [0.5]}
    by_values = dataclasses.replace(request(), standardize_by=given)
    x, y = (prepare_data(r, data, CPU).train.batch(slice(4))[0] for r in (by_values, request()))
    torch.testing.assert_close(x, (y - 0.25) / 0.5)
    labels = prepare_data(request(random_labels=True), data, CPU).train.labels
    assert not torch.equal(labels, data.train.labels)
    assert torch.equal(labels, prepare_data(request(random_labels=True), data, CPU).train.labels)
    prepare_data(request(crop=3), data, CPU)
    with pytest.raises(RequestError, match="crop is 4; expected less than the images' 4 x 4"):
        prepare_data(request(crop=4), data, CPU)


def test_sizes_are_those_of_the_dense_network(data, tmp_path):
    job = prepare_job(request(), data, tmp_path, launch())
    assert (job.macs, job.parameters) == (16 * 6 + 6 * 3, 17 * 6 + 7 * 3)
    assert job.example.shape == (8, 1, 4, 4) and job.method.num_data == 40
    assert [gate.size for gate in job.method.gates] == [6]
    assert list(tmp_path.iterdir()) == []


class Attentive(nn.Module):
    """A network with attention, for 4 x 4 images."""

    def __init__(self, num_classes):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        x = x[:, 0]
        return self.fc(self.attention(x, x, x, need_weights=False)[0].flatten(1))


def test_weights_of_attention_are_taken_as_built_and_as_a_run_separates_it(data, tmp_path):
    torch.manual_seed(1)
    net = Attentive(3)
    torch.save(net.state_dict(), tmp_path / "built.pt")
    torch.save(separate_attention(net).state_dict(), tmp_path / "separate.pt")
    x = torch.rand(5, 1, 4, 4)
    for name in ("built.pt", "separate.pt"):
        asked = dataclasses.replace(request(Attentive), weights=str(tmp_path / name))
        job = prepare_job(asked, data, tmp_path / "run", launch())
        torch.testing.assert_close(job.method.net.eval()(x), net.eval()(x))
