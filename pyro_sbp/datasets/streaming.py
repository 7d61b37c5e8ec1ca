"""Images that worker processes read from disk during training."""

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

#: Seconds that a worker continues to run after SIGTERM.
GRACE = 60
#: The signals that ask a run to stop.
STOPPING = (signal.SIGINT, signal.SIGTERM)


class DamagedImage(SingleProcessError, RequestError):
    """A file is not an image. The message names the file."""


class WorkerDied(SingleProcessError, RuntimeError):
    """A process that reads images was killed. The steps since the last checkpoint are lost."""


@dataclass(frozen=True)
class ImageFiles(Dataset):
    """Image files that are read as RGB and resized (bilinear) when they are needed.

    Attributes:
        paths: the paths of the files.
        size: the height and the width after resizing.
    """

    paths: list[str]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all images as one tensor."""
        return (len(self.paths), 3, *self.size)

    def read(self, index: Sequence[int]) -> Tensor:
        """Read the images of some indices, uint8 ``[len(index), 3, height, width]``.

        Raises:
            DamagedImage: a file is not an image. The message names the file.
        """
        images = torch.empty((len(index), *self.shape[1:]), dtype=torch.uint8, device="cpu")
        for image, i in zip(images, index, strict=True):
            image.copy_(_read(self.paths[i], self.size))
        return images

    def __getitem__(self, index: Sequence[int]) -> Tensor | str:
        """As `read`, for a worker process. An error is returned as its message, for the main
        process.
        """
        try:
            return self.read(index)
        except DamagedImage as error:
            return str(error)


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except Exception as error:  # a file that is not an image may raise anything
        raise DamagedImage(f"{path} cannot be read as an image: {first_line(error)}") from error


def image_size_of(path: str) -> tuple[int, int]:
    """The height and the width of an image file.

    Raises:
        DamagedImage: the file is not an image.
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
        labels: int64 ``[examples]``, on the device of the batches.
        standardization: applied to every batch as the last step; with None, pixels are in [0, 1].
        workers: the number of processes that read images for `batches`; `batch` reads them in this
            process.
    """

    images: ImageFiles
    labels: Tensor
    standardization: Standardization | None = None
    workers: int = 1

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The number of channels, the height and the width."""
        return self.images.shape[1:]

    def to(self, device: torch.device) -> StreamedSplit:
        """The same images, with batches on a device."""
        last = self.standardization
        return dataclasses.replace(
            self,
            labels=self.labels.to(device),
            standardization=None if last is None else last.to(device),
        )

    def part(self, index: Tensor) -> StreamedSplit:
        """The examples with the indices in a tensor, as a new split."""
        files = ImageFiles([self.images.paths[i] for i in index.tolist()], self.images.size)
        labels = self.labels[index.to(self.labels.device)]
        return dataclasses.replace(self, images=files, labels=labels)

    def with_labels(self, labels: Tensor) -> StreamedSplit:
        """The same images with other labels."""
        return dataclasses.replace(self, labels=labels)

    def standardized_by(self, standardization: Standardization) -> StreamedSplit:
        """The same images with another standardization."""
        return dataclasses.replace(self, standardization=standardization)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images, as float32 in [0, 1] or standardized, and labels of the given indices.

        Raises:
            DamagedImage: a file is not an image.
        """
        numbers = torch.arange(len(self), device="cpu")[
            index.cpu() if isinstance(index, Tensor) else index
        ]
        pixels = self.images.read(numbers.tolist()).to(self.labels.device)
        return self._values(pixels, None), self.labels[numbers.to(self.labels.device)]

    def pixels(self, indices: Sequence[Tensor]) -> Generator[Tensor]:
        """The stored images, uint8, on the device of the batches, one batch per index tensor.

        The worker processes end with the generator.

        Raises:
            DamagedImage: a file is not an image.
            WorkerDied: a worker was killed. In most cases torch raises its error elsewhere, see
                `workers_watched`.
        """
        device = self.labels.device
        loader = DataLoader(
            self.images,
            batch_size=None,  # a worker reads a whole batch, whose indices `sampler` gives
            sampler=[index.tolist() for index in indices],
            num_workers=min(self.workers, len(indices)),
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_main,
            # Separate, because torch would draw a seed for the workers from the generator of
            # training.
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
            # A batch is in the memory of the worker that read it.
            raise _died(error) from error
        finally:
            # Shut down now. A traceback can keep the iterator alive until the program exits, where
            # the workers would delay the exit.
            if isinstance(batches, _MultiProcessingDataLoaderIter):
                batches._shutdown_workers()
                # A worker may wait for a lock of a worker that was killed.
                for worker in batches._workers:
                    if worker.is_alive():
                        worker.kill()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Within the context, a new worker receives no signal before it has installed its handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_main(worker: int) -> None:
    """Keep a worker running after a signal to the whole group, while the main process ends its
    step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


@contextmanager
def workers_watched() -> Iterator[None]:
    """Within the context, the death of a worker raises `WorkerDied`.

    Torch learns of it by a signal, and can raise its error anywhere in the program.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _died(error) from error


def _died(error: Exception) -> WorkerDied:
    return WorkerDied(f"a process that reads images died ({first_line(error).rstrip('. ')})")


def default_workers() -> int:
    """The default number of workers: the number of cores of this process, but at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, cores or 1)
