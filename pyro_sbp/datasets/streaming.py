"""Images that stay on disk, and are read by worker processes while the device works."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pyro_sbp.datasets.splits import LabelledImages
from pyro_sbp.datasets.standardization import Standardization
from pyro_sbp.errors import RequestError, SingleProcessError, first_line

__all__ = [
    "ImageFiles",
    "StreamedSplit",
    "WorkerDied",
    "default_workers",
    "image_size_of",
    "workers_watched",
]

#: Seconds that a worker goes on for after a SIGTERM.
GRACE = 60
#: The signals by which a run is asked to stop.
STOPPING = (signal.SIGINT, signal.SIGTERM)


class DamagedImage(SingleProcessError, RequestError):
    """A file is no image; the message names it."""


class WorkerDied(SingleProcessError, RuntimeError):
    """A process that reads images was killed; what was trained since the checkpoint is lost."""


@dataclass(frozen=True)
class ImageFiles(Dataset):
    """Image files that are read as RGB and resized (bilinear) when they are asked for.

    Attributes:
        paths: of the files.
        size: height and width.
    """

    paths: list[str]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of all images as one tensor."""
        return (len(self.paths), 3, *self.size)

    def read(self, index: Sequence[int]) -> Tensor:
        """Some images, uint8 ``[len(index), 3, height, width]``.

        Raises:
            DamagedImage: a file is no image; the message names it.
        """
        images = torch.empty((len(index), *self.shape[1:]), dtype=torch.uint8, device="cpu")
        for image, i in zip(images, index, strict=True):
            image.copy_(_read(self.paths[i], self.size))
        return images

    def __getitem__(self, index: Sequence[int]) -> Tensor | str:
        """As `read`, for a worker: a refusal is its message, which crosses to the main process."""
        try:
            return self.read(index)
        except DamagedImage as error:
            return str(error)


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except Exception as error:  # a file that is none may raise anything
        raise DamagedImage(f"{path} cannot be read as an image: {first_line(error)}") from error


def image_size_of(path: str) -> tuple[int, int]:
    """Height and width of an image file.

    Raises:
        DamagedImage: it is no image.
    """
    with _opened(path) as file:
        return file.height, file.width


def _read(path: str, size: tuple[int, int]) -> Tensor:
    with _opened(path) as file:
        image = file.convert("RGB")
    if image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True, eq=False)
class StreamedSplit(LabelledImages):
    """A split whose images are read from disk, batch by batch.

    Attributes:
        images: the files.
        labels: int64 ``[examples]``, on the device where batches are wanted.
        standardization: applied to every batch last; None leaves pixels in [0, 1].
        workers: how many processes read for `batches`; `batch` reads in this one.
    """

    images: ImageFiles
    labels: Tensor
    standardization: Standardization | None = None
    workers: int = 1

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return self.images.shape[1:]

    def to(self, device: torch.device) -> StreamedSplit:
        """The same with batches on a device."""
        last = self.standardization
        return dataclasses.replace(
            self,
            labels=self.labels.to(device),
            standardization=None if last is None else last.to(device),
        )

    def part(self, index: Tensor) -> StreamedSplit:
        """The examples of an index tensor, as a split of their own."""
        files = ImageFiles([self.images.paths[i] for i in index.tolist()], self.images.size)
        labels = self.labels[index.to(self.labels.device)]
        return dataclasses.replace(self, images=files, labels=labels)

    def with_labels(self, labels: Tensor) -> StreamedSplit:
        """The same images with other labels."""
        return dataclasses.replace(self, labels=labels)

    def standardized_by(self, standardization: Standardization) -> StreamedSplit:
        """The same with another standardization."""
        return dataclasses.replace(self, standardization=standardization)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Some examples: images as float32, in [0, 1] unless standardised, and labels.

        Raises:
            DamagedImage: a file is no image.
        """
        numbers = torch.arange(len(self), device="cpu")[
            index.cpu() if isinstance(index, Tensor) else index
        ]
        pixels = self.images.read(numbers.tolist()).to(self.labels.device)
        return self._values(pixels, None), self.labels[numbers.to(self.labels.device)]

    def pixels(self, indices: Sequence[Tensor]) -> Generator[Tensor]:
        """The images as they are stored, uint8, on the device: a batch for every index tensor.

        The workers live as long as the generator.

        Raises:
            DamagedImage: a file is no image.
            WorkerDied: a worker was killed. Torch mostly raises for it at another place: see
                `workers_watched`.
        """
        device = self.labels.device
        loader = DataLoader(
            self.images,
            batch_size=None,  # a worker reads a whole batch, as `sampler` lists it
            sampler=[index.tolist() for index in indices],
            num_workers=min(self.workers, len(indices)),
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_main,
            # Its own: a seed for the workers would be drawn from the one of training.
            generator=torch.Generator(),
        )
        with _signals_held():
            batches = iter(loader)
        try:
            for images in batches:
                if isinstance(images, str):
                    raise DamagedImage(images)
                yield images.to(device, non_blocking=True)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            # A batch is fetched from the memory of the worker that made it.
            raise _died(error) from error
        finally:
            # Now, not when the last traceback that holds the iterator goes: at the exit of the
            # program the workers would take their time.
            if isinstance(batches, _MultiProcessingDataLoaderIter):
                batches._shutdown_workers()
                # One may be stuck at a lock that a killed one held.
                for worker in batches._workers:
                    if worker.is_alive():
                        worker.kill()


@contextmanager
def _signals_held() -> Iterator[None]:
    """A worker that is started inside gets no signal before it knows what to do with it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_main(worker: int) -> None:
    """Ctrl-C and a stop of the whole group come to workers too, while main ends its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@contextmanager
def workers_watched() -> Iterator[None]:
    """Inside, the death of a worker raises `WorkerDied`, whatever the program is at.

    Torch notices it by a signal, and raises in the middle of anything.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _died(error) from error


def _died(error: Exception) -> WorkerDied:
    return WorkerDied(f"a data loader worker died ({first_line(error).rstrip('. ')})")


def default_workers() -> int:
    """Four, or as many as there are cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, cores or 1)
