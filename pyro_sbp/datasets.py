"""Labelled images, held as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.sources import SOURCES, check_dataset, folder_classes

__all__ = ["ImageData", "Split", "load_dataset"]


@dataclass(frozen=True)
class Split:
    """Images ``[examples, channels, height, width]``, uint8; labels ``[examples]``, int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """The same on a device."""
        return Split(self.images.to(device), self.labels.to(device))

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Some examples: images as float32 in [0, 1], and labels."""
        return self.images[index].float().div(255), self.labels[index]


@dataclass(frozen=True)
class ImageData:
    """A data set: what is trained on, what is tested on, and the names of the classes."""

    train: Split
    test: Split
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> ImageData:
        """The same on a device."""
        return ImageData(self.train.to(device), self.test.to(device), self.classes)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return tuple(self.train.images.shape[1:])


def load_dataset(
    name: str, data_dir: str | Path = "data", image_size: int | None = None
) -> ImageData:
    """Load a data set, downloading it under `data_dir` where it is missing.

    Args:
        name: one of `SOURCES`, "digits", or "folder:PATH".
        data_dir: where torchvision's data sets lie.
        image_size: height and width to which images of another size are resized (bilinear); None
            keeps them.

    Raises:
        RequestError: the data set is unknown, missing or damaged.
    """
    data_dir = Path(data_dir)
    check_dataset(name, data_dir)
    if name == "digits":
        data = _digits()
    elif name.startswith("folder:"):
        data = _folder(Path(name.removeprefix("folder:")), image_size)
    else:
        data = _torchvision(name, data_dir)
    if image_size is None or data.image_shape[1:] == (image_size, image_size):
        return data
    return ImageData(
        Split(_resize(data.train.images, image_size), data.train.labels),
        Split(_resize(data.test.images, image_size), data.test.labels),
        data.classes,
    )


def _resize(images: Tensor, size: int) -> Tensor:
    resized = F.interpolate(
        images.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return resized.round().clamp(0, 255).to(torch.uint8)


def _digits() -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8x8; every fifth is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(labels)) % 5 == 4
    return ImageData(
        Split(images[~test], labels[~test]),
        Split(images[test], labels[test]),
        tuple(str(digit) for digit in range(10)),
    )


def _torchvision(name: str, data_dir: Path) -> ImageData:
    from torchvision import datasets

    source = SOURCES[name]
    here = all((data_dir / source.folder / file).is_file() for file in source.files)
    try:
        parts = [
            getattr(datasets, source.class_name)(data_dir, train=train, download=not here)
            for train in (True, False)
        ]
        splits = [Split(_images(part.data), torch.as_tensor(part.targets)) for part in parts]
    except (AssertionError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"{name} under {data_dir / source.folder} cannot be read ({first_line(error)}): delete "
            "it so that it can be fetched again, or give another --data-dir"
        ) from error
    for split in splits:
        if len(split.images) != len(split.labels):
            raise RequestError(
                f"{name} under {data_dir / source.folder} has {len(split.images)} images and "
                f"{len(split.labels)} labels: delete it so that it can be fetched again"
            )
    return ImageData(splits[0], splits[1], tuple(parts[0].classes))


def _images(data: Any) -> Tensor:
    images = torch.as_tensor(data)
    return (images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)).contiguous()


def _folder(root: Path, image_size: int | None) -> ImageData:
    from PIL.Image import Resampling
    from torchvision.datasets import ImageFolder

    size = image_size
    splits = []
    for part in ("train", "test"):
        folder = ImageFolder(str(root / part))
        images = []
        for path, _ in folder.samples:
            try:
                image = folder.loader(path)
            except (OSError, SyntaxError) as error:
                raise RequestError(
                    f"{path} cannot be read as an image: {first_line(error)}"
                ) from error
            # The first image decides, where the network does not.
            shape = (size, size) if isinstance(size, int) else size or image.size
            size = shape if size is None else size
            if image.size != shape:
                image = image.resize(shape, Resampling.BILINEAR)
            images.append(np.asarray(image))
        labels = torch.tensor([label for _, label in folder.samples])
        splits.append(Split(_images(np.stack(images)), labels))
    return ImageData(splits[0], splits[1], tuple(folder_classes(root)))
