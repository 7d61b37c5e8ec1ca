"""Random crops and flips: which pixels come where, how often, and what stays."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from pyro_sbp.datasets.augmentation import Augmentation
from pyro_sbp.datasets.splits import Split


def numbered(examples, channels=2, height=6, width=8):
    """Images whose every pixel is another number, none of them zero."""
    count = examples * channels * height * width
    return torch.arange(1.0, count + 1).view(examples, channels, height, width)


def offsets(x, cropped, pad):
    """Of every image, the one offset at which its padded original has this crop."""
    padded = F.pad(x, (pad, pad, pad, pad))
    height, width = x.shape[2:]
    found = torch.full((len(x), 2), -1)
    for down in range(2 * pad + 1):
        for right in range(2 * pad + 1):
            there = padded[:, :, down : down + height, right : right + width]
            same = (there == cropped).flatten(1).all(1)
            found[same] = torch.tensor([down, right])
    return found


def test_every_image_is_cut_at_an_offset_of_its_own_and_all_are_as_likely():
    torch.manual_seed(0)
    x, pad = numbered(5000), 2
    found = offsets(x, Augmentation(crop=pad)(x), pad)
    assert int(found.min()) == 0
    counts = torch.zeros(5, 5).index_put_(tuple(found.T), torch.ones(5000), accumulate=True)
    # Chi squared with 24 degrees of freedom is under 51 in 99.9 % of cases.
    assert float(((counts - 200) ** 2 / 200).sum()) < 51


def test_a_flip_mirrors_half_of_the_images():
    torch.manual_seed(0)
    x = numbered(2000)
    y = Augmentation(flip=True)(x)
    same, mirrored = ((z == y).flatten(1).all(1) for z in (x, x.flip(-1)))
    assert bool((same ^ mirrored).all()) and 900 < int(mirrored.sum()) < 1100


def test_what_is_off_draws_no_random_number():
    x, before = numbered(3), torch.get_rng_state()
    assert torch.equal(Augmentation()(x), x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augment", [Augmentation(crop=3), Augmentation(flip=True)])
def test_nothing_waits_for_the_device(augment):
    """A tensor without values cannot be read from: a synchronisation would raise."""
    with FakeTensorMode():
        assert augment(torch.rand(4, 3, 8, 9)).shape == (4, 3, 8, 9)
        with pytest.raises(RuntimeError):
            torch.rand(4).sum().item()


def test_images_keep_their_labels():
    torch.manual_seed(0)
    labels = torch.randint(1, 256, (300,))
    split = Split(labels.to(torch.uint8)[:, None, None, None].expand(-1, 1, 9, 9), labels)
    order = torch.randperm(300).split(64)
    batches = list(split.batches(order, Augmentation(crop=2, flip=True)))
    for (x, y), index in zip(batches, order, strict=True):
        assert torch.equal(y, labels[index])
        assert torch.equal((x.amax((1, 2, 3)) * 255).round().long(), y)
