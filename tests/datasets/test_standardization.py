"""Mean and standard deviation of the channels of a data set."""

import numpy as np
import pytest
import torch

from pyro_sbp.datasets import loading as datasets
from pyro_sbp.datasets.augmentation import Augmentation
from pyro_sbp.datasets.loading import ImageData, load_dataset
from pyro_sbp.datasets.splits import Split
from pyro_sbp.datasets.standardization import Standardization


def images(count=50, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.array([255, 40, 3])[:, None, None]
    return torch.from_numpy((rng.random((count, 3, 5, 7)) * scale).astype(np.uint8))


def test_it_is_what_numpy_says_whatever_the_batches():
    x = images()
    measured = Standardization.measure(x.split(7)).to_dict()
    pixels = x.numpy().astype(np.longdouble) / 255
    assert measured["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-6)
    assert measured["std"] == pytest.approx(pixels.std((0, 2, 3)).tolist(), rel=1e-6)
    assert measured == Standardization.measure(x.flip(0).split(50)).to_dict()
    with pytest.raises(ValueError, match="no image"):
        Standardization.measure([])


def test_a_constant_channel_becomes_zero():
    x = images()
    x[:, 1] = 77
    measured = Standardization.measure([x])
    assert measured.to_dict()["std"][1] == 1
    assert float(measured(x / 255)[:, 1].abs().max()) < 1e-6


def test_standardized_training_images_have_mean_zero_and_deviation_one():
    data = load_dataset("digits")
    data = data.standardized()
    x, y = data.train.batch(slice(None))
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std(correction=0)) == pytest.approx(1, abs=1e-5)
    # The test images by what was measured on the others.
    first, _ = data.test.batch(torch.tensor([3]))
    raw = data.test.images[3:4].float() / 255
    measured = data.train.standardization.to_dict()
    assert torch.allclose(first, (raw - measured["mean"][0]) / measured["std"][0])
    assert torch.equal(y, data.train.labels)


def test_of_many_images_a_sample_is_measured(monkeypatch):
    monkeypatch.setattr(datasets, "STANDARDIZE_ON", 20)
    labels = torch.zeros(500, dtype=torch.int64)
    split = Split(torch.arange(500).mul(0.5).to(torch.uint8)[:, None, None, None], labels)
    data = ImageData(split, split, ("a",))
    first = data.standardized().train.standardization.to_dict()
    assert first == data.standardized().train.standardization.to_dict()
    whole = Standardization.measure([split.images]).to_dict()
    assert first != whole and first["mean"] == pytest.approx(whole["mean"], abs=0.2)


def test_padding_is_black_and_then_standardized():
    """The pad is of zero pixels, not of zeros in the standardized image."""
    torch.manual_seed(0)
    split = Split(torch.full((40, 1, 4, 4), 200, dtype=torch.uint8), torch.zeros(40).long())
    last = Standardization(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.25))
    split = Split(split.images, split.labels, last)
    ((x, _),) = split.batches([torch.arange(40)], Augmentation(crop=1))
    expected = torch.tensor([-2.0, (200 / 255 - 0.5) / 0.25])
    assert torch.allclose(x.unique(), expected)
