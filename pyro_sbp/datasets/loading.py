"""Load data sets into memory, or prepare them to be read from disk."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_sbp.datasets.downloading import download
from pyro_sbp.datasets.memory import available_memory
from pyro_sbp.datasets.sources import SOURCES, check_dataset, folder_classes
from pyro_sbp.datasets.splits import LabelledImages, Split
from pyro_sbp.datasets.standardization import Standardization
from pyro_sbp.datasets.streaming import ImageFiles, StreamedSplit, default_workers, image_size_of
from pyro_sbp.errors import RequestError, damage, first_line

__all__ = ["ImageData", "Split", "load_dataset"]

#: If the images of a folder would take more than this share of the available memory, they are read
#: from disk.
MEMORY_SHARE = 0.25
#: The number of training images, drawn with a fixed seed, on which mean and standard deviation are
#: measured.
STANDARDIZE_ON = 10_000
#: The exceptions that torchvision raises for damaged files.
_DAMAGED = (
    AssertionError,
    EOFError,
    LookupError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set.

    Attributes:
        train: the training images.
        test: the test images.
        classes: the names of the classes.
        validation: the training images that are reserved for validation, if there are any.
    """

    train: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]
    validation: LabelledImages | None = None

    def _each(self, change: Callable[[LabelledImages], LabelledImages]) -> ImageData:
        validation = None if self.validation is None else change(self.validation)
        return ImageData(change(self.train), change(self.test), self.classes, validation)

    def to(self, device: torch.device) -> ImageData:
        """The same data on a device."""
        return self._each(lambda split: split.to(device))

    def held_out(self, count: int) -> ImageData:
        """The same data with `count` training images reserved for validation. They do not depend on
        the seed of the run.

        Raises:
            RequestError: fewer than two training images would remain.
        """
        if count > len(self.train) - 2:
            raise RequestError(
                f"holdout is {count}; expected at most {len(self.train) - 2}, as two of the "
                f"{len(self.train)} training images must remain"
            )
        drawn = torch.Generator().manual_seed(1)
        order = torch.randperm(len(self.train), generator=drawn, device="cpu")
        train, validation = order[count:].sort().values, order[:count].sort().values
        return ImageData(
            self.train.part(train), self.test, self.classes, self.train.part(validation)
        )

    def with_random_labels(self, seed: int) -> ImageData:
        """The same data with random labels for the training images. A network can only memorise
        them (Zhang et al. 2017, arXiv 1611.03530).
        """
        drawn = torch.Generator().manual_seed(seed)
        labels = torch.randint(len(self.classes), (len(self.train),), generator=drawn, device="cpu")
        labels = labels.to(self.train.labels)
        return dataclasses.replace(self, train=self.train.with_labels(labels))

    def standardized(self, by: Standardization | None = None) -> ImageData:
        """The same data, with every channel standardized by its mean and standard deviation.

        They are measured on the training images, on a sample if there are more than
        `STANDARDIZE_ON`. The sample is the same whether the images are in memory or on disk.

        Args:
            by: the statistics to use instead. For grey images, they are averaged over channels.

        Raises:
            RequestError: `by` has another number of channels than the images.
        """
        if by is not None:
            device, channels = self.train.labels.device, self.image_shape[0]
            if channels == 1:
                by = Standardization(by.mean.mean(0, keepdim=True), by.std.mean(0, keepdim=True))
            if len(by.mean) != channels or len(by.std) != channels:
                raise RequestError(
                    f"mean and std are of {len(by.mean)} channels; the images have {channels}"
                )
            given = by.to(device)
            return self._each(lambda split: split.standardized_by(given))
        drawn = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.train), generator=drawn, device="cpu")
        sample = order[:STANDARDIZE_ON].sort().values
        measured = Standardization.measure(self.train.pixels(sample.split(100)))
        return self._each(lambda split: split.standardized_by(measured))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return self.train.image_shape


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    workers: int | None = None,
    device: str | torch.device = "cpu",
) -> ImageData:
    """Load a data set, and download it to `data_dir` if it is missing.

    Args:
        name: one of `SOURCES`, "digits", or "folder:PATH".
        data_dir: the directory of torchvision's data sets.
        image_size: height and width to which images of another size are resized (bilinear); None
            keeps their size.
        workers: the number of processes that read the images of a folder from disk during training.
            0 loads them into memory. With None, they are read from disk by up to four processes if
            the decoded images would take more than `MEMORY_SHARE` of the available memory, else
            loaded into memory. The batches are the same in both cases.
        device: the device to which the data will be moved (`ImageData.to`). If it is a GPU, its
            memory also limits what is loaded.

    Raises:
        RequestError: the data set is unknown, missing or damaged, or `workers` is given for a data
            set that is not a folder. A damaged image that is read from disk during training raises
            it when its batch is needed.
    """
    data_dir = Path(data_dir)
    check_dataset(name, data_dir, workers)
    if name.startswith("folder:"):
        root = Path(name.removeprefix("folder:"))
        return _folder(root, image_size, workers, torch.device(device))
    train, test, classes = _digits() if name == "digits" else _torchvision(name, data_dir)
    if image_size is not None:
        train, test = _resized(train, image_size), _resized(test, image_size)
    return ImageData(train, test, classes)


def _resized(split: Split, size: int) -> Split:
    if split.image_shape[1:] == (size, size):
        return split
    resized = F.interpolate(
        split.images.float(),
        size=(size, size),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    return Split(resized.round().clamp(0, 255).to(torch.uint8), split.labels)


def _digits() -> tuple[Split, Split, tuple[str, ...]]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels. Every fifth image is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(labels), device="cpu") % 5 == 4
    return (
        Split(images[~test], labels[~test]),
        Split(images[test], labels[test]),
        tuple(str(name) for name in bunch.target_names),
    )


def _torchvision(name: str, data_dir: Path) -> tuple[Split, Split, tuple[str, ...]]:
    from torchvision import datasets

    download(name, data_dir)
    source = SOURCES[name]
    folder = data_dir / source.folder
    try:
        parts = [getattr(datasets, source.class_name)(data_dir, train=t) for t in (True, False)]
        splits = [
            Split(_images(part.data), torch.as_tensor(part.targets, device="cpu")) for part in parts
        ]
    except OSError as error:
        raise RequestError(
            f"{name} in {folder} cannot be read ({first_line(error)}): give another --data-dir"
        ) from error
    except _DAMAGED as error:
        raise RequestError(
            f"{name} in {folder} is damaged ({damage(error)}): delete it so that it can be "
            "downloaded again, or give another --data-dir"
        ) from error
    for split in splits:
        if len(split.images) != len(split.labels):
            raise RequestError(
                f"{name} in {folder} is damaged: it has {len(split.images)} images and "
                f"{len(split.labels)} labels; delete it so that it can be downloaded again"
            )
    return splits[0], splits[1], tuple(parts[0].classes)


def _images(data: Any) -> Tensor:
    images = torch.as_tensor(data, device="cpu")
    return (images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)).contiguous()


def _folder(
    root: Path, image_size: int | None, workers: int | None, device: torch.device
) -> ImageData:
    from torchvision.datasets import ImageFolder

    samples = [ImageFolder(str(root / part)).samples for part in ("train", "test")]
    # If the network has no image size, that of the first image is used.
    size = image_size_of(samples[0][0][0]) if image_size is None else (image_size, image_size)
    files = [ImageFiles([path for path, _ in part], size) for part in samples]
    labels = [torch.tensor([label for _, label in part], device="cpu") for part in samples]
    if workers is None:
        workers = default_workers() if _too_large(files, device) else 0
    train, test = (
        StreamedSplit(f, y, workers=workers) if workers else Split(f.read(range(len(f.paths))), y)
        for f, y in zip(files, labels, strict=True)
    )
    return ImageData(train, test, tuple(folder_classes(root)))


def _too_large(files: Sequence[ImageFiles], device: torch.device) -> bool:
    """Whether the decoded images would take more than `MEMORY_SHARE` of the available memory."""
    available = available_memory(device)
    decoded = sum(math.prod(part.shape) for part in files)
    return available is not None and decoded > MEMORY_SHARE * available
