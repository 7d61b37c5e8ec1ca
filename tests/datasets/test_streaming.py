"""Images that are read from disk as they are needed."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_sbp.datasets import loading as datasets
from pyro_sbp.datasets.loading import load_dataset
from pyro_sbp.datasets.splits import Split
from pyro_sbp.datasets.streaming import StreamedSplit, WorkerDied, default_workers, workers_watched
from pyro_sbp.errors import RequestError

WORKERS = min(2, default_workers())


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 9), ("test", 4)):
        for name in ("cat", "dog", "eel"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (12, 10 + i % 2, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def load(root, **settings):
    return load_dataset(f"folder:{root}", **settings)


def test_batches_are_those_of_the_folder_in_memory(folder):
    held, streamed = load(folder, workers=0), load(folder, workers=WORKERS)
    assert type(held.train) is Split and type(streamed.train) is StreamedSplit
    assert held.image_shape == streamed.image_shape == (3, 12, 10)
    assert len(held.train) == len(streamed.train) == 27
    order = torch.randperm(27).split(4)
    before = torch.get_rng_state()
    for _ in range(2):
        pairs = zip(held.train.batches(order), streamed.train.batches(order), strict=True)
        for (x, y), (x2, y2) in pairs:
            assert x2.dtype == torch.float32 and torch.equal(x, x2) and torch.equal(y, y2)
    for index in (slice(0, 5), torch.tensor([7, 2])):
        for one, other in zip(held.test.batch(index), streamed.test.batch(index), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(streamed.train.batches([])) == []
    measured = [data.standardized().train.standardization for data in (held, streamed)]
    assert measured[0].to_dict() == measured[1].to_dict()


def test_a_folder_is_streamed_where_memory_is_short(folder, monkeypatch):
    decoded = (27 + 12) * 3 * 12 * 10
    for available, kind in ((4 * decoded, Split), (4 * decoded - 4, StreamedSplit), (None, Split)):
        monkeypatch.setattr(datasets, "available_memory", lambda device, a=available: a)
        assert type(load(folder).train) is kind
    monkeypatch.setattr(datasets, "available_memory", lambda device: 0)
    assert load(folder).train.workers == default_workers()
    assert type(load(folder, workers=0).train) is Split


def test_what_is_no_folder_is_not_streamed():
    with pytest.raises(
        RequestError, match="--workers applies to folder:PATH only; digits is loaded"
    ):
        load_dataset("digits", workers=1)


def test_an_image_that_cannot_be_decoded_is_named(folder):
    path = folder / "train" / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])
    words = r"dog.3\.png cannot be read as an image: "
    with pytest.raises(RequestError, match=words):
        load(folder, workers=0)
    streamed = load(folder, workers=WORKERS)
    batches = streamed.train.batches(torch.arange(27).split(4))
    x, _ = next(batches)
    assert len(x) == 4
    with pytest.raises(RequestError, match=words) as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match=words):
        streamed.train.batch(slice(None))
    path.unlink()
    with pytest.raises(RequestError, match=words):
        list(streamed.train.batches([torch.arange(27)]))


def test_workers_end_with_their_batches(folder):
    batches = load(folder, workers=WORKERS).train.batches(torch.arange(27).split(2))
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == WORKERS
    # As Ctrl-C and a stop of the whole group do.
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 13
    assert not multiprocessing.active_children()
    batches = load(folder, workers=WORKERS).train.batches(torch.arange(27).split(2))
    next(batches)
    batches.close()
    assert not multiprocessing.active_children()


def test_other_errors_are_not_taken_for_a_worker_s_death():
    with pytest.raises(RuntimeError, match=r"^something else$") as caught, workers_watched():
        raise RuntimeError("something else")
    assert not isinstance(caught.value, WorkerDied)


@pytest.mark.usefixtures("files_of_a_killed_worker")
def test_a_killed_worker_ends_the_batches_in_one_line(folder):
    batches = load(folder, workers=WORKERS).train.batches(torch.arange(27).repeat(200).split(2))
    with (
        pytest.raises(WorkerDied, match=r"^a process that reads images died \(.*\)$") as caught,
        workers_watched(),
    ):
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        for _ in batches:
            pass
    assert "\n" not in str(caught.value)
    batches.close()
    assert not multiprocessing.active_children()
