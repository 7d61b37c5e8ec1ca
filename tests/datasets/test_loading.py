"""Data sets: what is loaded, and what is refused before it is."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_sbp.datasets import sources
from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.datasets.sources import check_dataset
from pyro_sbp.errors import RequestError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "MNIST"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(sources, "_reachable", lambda host: False)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def make_mnist(root, train=20, test=10):
    rng = np.random.default_rng(0)
    raw = root / "MNIST" / "raw"
    for part, count in (("train", train), ("t10k", test)):
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    return raw


def make_folder(root, parts=("train", "test"), classes=("cat", "dog"), count=3):
    rng = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")


def test_images_are_held_out_of_the_training_ones_alone(tmp_path):
    make_folder(tmp_path, count=20)
    held = [load_dataset(f"folder:{tmp_path}", workers=n).held_out(9) for n in (0, 1)]
    for data in held:
        assert (len(data.train), len(data.validation), len(data.test)) == (31, 9, 40)
    memory, streamed = held
    every = slice(None)
    for part in ("train", "validation"):
        for ours, theirs in zip(
            getattr(memory, part).batch(every), getattr(streamed, part).batch(every), strict=True
        ):
            assert torch.equal(ours, theirs)
    whole = load_dataset(f"folder:{tmp_path}", workers=0).train.batch(every)[0]
    parts = torch.cat([memory.train.batch(every)[0], memory.validation.batch(every)[0]])
    assert len(parts.flatten(1).unique(dim=0)) == len(whole.flatten(1).unique(dim=0)) == 40
    with pytest.raises(RequestError, match="holdout is 39; expected at most 38, as two of the 40 "):
        load_dataset(f"folder:{tmp_path}", workers=0).held_out(39)


def test_digits_are_split_without_overlap():
    data = load_dataset("digits", Path("nowhere"), 28)
    assert data.image_shape == (1, 28, 28)
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert len(data.classes) == 10 and data.train.labels.unique().numel() == 10
    assert data.train.images.dtype == torch.uint8 and int(data.train.images.max()) == 255
    x, y = data.test.batch(slice(0, 2))
    assert x.shape == (2, 1, 28, 28) and 0 <= float(x.min()) < float(x.max()) <= 1
    assert y.dtype == torch.int64


def test_mnist_from_files(tmp_path, offline):
    make_mnist(tmp_path)
    data = load_dataset("mnist", tmp_path, 28)
    assert data.train.images.shape == (20, 1, 28, 28)
    assert data.test.labels.tolist() == list(range(10))


@pytest.mark.skipif(not SHARED.is_dir(), reason="real MNIST is not in ../shared/data")
def test_real_mnist_from_its_archives(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (SHARED / "raw").glob("*.gz"):
        (raw / path.name).write_bytes(path.read_bytes())
    data = load_dataset("mnist", tmp_path, 28)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert torch.bincount(data.test.labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


def test_a_truncated_file_is_refused(tmp_path, offline):
    raw = make_mnist(tmp_path)
    path = raw / "t10k-images-idx3-ubyte"
    os.truncate(path, 1000)
    with pytest.raises(RequestError, match=r"t10k-images-idx3-ubyte is damaged: it has 1000 bytes"):
        check_dataset("mnist", tmp_path)
    os.truncate(path, 3)
    with pytest.raises(RequestError, match="is not an IDX file"):
        check_dataset("mnist", tmp_path)


def test_images_without_labels_are_refused(tmp_path, offline):
    raw = make_mnist(tmp_path)
    write_idx(raw / "train-labels-idx1-ubyte", np.arange(5))
    with pytest.raises(RequestError, match="20 images and 5 labels"):
        load_dataset("mnist", tmp_path)


def test_missing_data_without_a_network_names_the_ways_out(tmp_path, offline):
    for name in sources.SOURCES:
        with pytest.raises(RequestError, match=r"--data-dir .*--dataset digits"):
            check_dataset(name, tmp_path)


def test_an_image_folder_is_resized_to_the_network(tmp_path):
    make_folder(tmp_path)
    data = load_dataset(f"folder:{tmp_path}", Path("nowhere"), 32)
    assert data.image_shape == (3, 32, 32) and data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert load_dataset(f"folder:{tmp_path}", Path("nowhere")).image_shape == (3, 12, 10)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    def refused(words):
        with pytest.raises(RequestError, match=words):
            load_dataset(f"folder:{tmp_path}", Path("nowhere"))

    refused("train is not a directory")
    make_folder(tmp_path, parts=("train",))
    refused("test is not a directory")
    (tmp_path / "test").mkdir()
    refused("test has no directory for a class")
    make_folder(tmp_path, parts=("test",), classes=("cat",))
    refused("only one has dog")
    make_folder(tmp_path, parts=("test",), classes=("dog",), count=0)
    refused("dog has no images")
    (tmp_path / "test" / "dog" / "0.png").write_bytes(b"no image")
    refused(r"0\.png cannot be read as an image")


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(
        RequestError, match=r"unknown data set 'minst'; did you mean 'mnist'. expected mnist, "
    ):
        check_dataset("minst", tmp_path)


def test_data_can_be_compared():
    """Fields that are tensors have no single truth value; the values are compared by identity."""
    one, other = load_dataset("digits"), load_dataset("digits")
    assert one == one and one != other and one.train != other.train
    assert one.standardized().train.standardization != other.standardized().train.standardization
    assert len({one, other}) == 2


def test_a_folder_with_one_class_is_refused(tmp_path):
    make_folder(tmp_path, classes=("images",))
    with pytest.raises(RequestError, match="only one class, images; expected a directory for each"):
        check_dataset(f"folder:{tmp_path}", tmp_path)
    (tmp_path / "train" / "images" / "cat").mkdir()
    with pytest.raises(RequestError, match="such as cat, belong one level up"):
        check_dataset(f"folder:{tmp_path}", tmp_path)
