"""The files of data sets, and whether they are complete. This module does not import torch."""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from pyro_sbp.errors import RequestError, unknown

__all__ = ["SOURCES", "Source", "check_dataset", "folder_classes"]

#: The extensions of image files in a folder (those of torchvision's ImageFolder).
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)


@dataclass(frozen=True)
class Source:
    """A data set of torchvision.

    Attributes:
        class_name: its class in `torchvision.datasets`.
        folder: the directory of its files in the data directory.
        files: the names of the unpacked files.
        archives: the archives that contain them, relative to the data directory.
        host: the server from which it is downloaded.
    """

    class_name: str
    folder: str
    files: tuple[str, ...]
    archives: tuple[str, ...]
    host: str

    def is_unpacked(self, data_dir: Path) -> bool:
        """Whether all files are in the data directory."""
        return all((data_dir / self.folder / file).is_file() for file in self.files)


def _idx(class_name: str, host: str) -> Source:
    files = tuple(
        f"{part}-{kind}-ubyte"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    )
    folder = f"{class_name}/raw"
    return Source(class_name, folder, files, tuple(f"{folder}/{f}.gz" for f in files), host)


SOURCES = {
    "mnist": _idx("MNIST", "ossci-datasets.s3.amazonaws.com"),
    "fashion-mnist": _idx("FashionMNIST", "fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
    "kmnist": _idx("KMNIST", "codh.rois.ac.jp"),
    "cifar10": Source(
        "CIFAR10",
        "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        ("cifar-10-python.tar.gz",),
        "www.cs.toronto.edu",
    ),
    "cifar100": Source(
        "CIFAR100",
        "cifar-100-python",
        ("train", "test", "meta"),
        ("cifar-100-python.tar.gz",),
        "www.cs.toronto.edu",
    ),
}


def check_dataset(
    name: str, data_dir: Path, workers: int | None = None, download: bool = True
) -> None:
    """Check that the files of a data set exist and have the right sizes, or can be downloaded.

    Args:
        name, data_dir, workers: as for `load_dataset`.
        download: whether it may be downloaded later. Otherwise its unpacked files must exist.

    Raises:
        RequestError: the data set is unknown, missing or truncated, or is a folder without usable
            images; or `workers` is given, and the data set is not a folder.
    """
    if name.startswith("folder:"):
        folder_classes(Path(name.removeprefix("folder:")))
        return
    if name not in (*SOURCES, "digits"):
        hint = f"; did you mean 'folder:{name}'?" if Path(name).is_dir() else ""
        names = [*SOURCES, "digits"]
        raise RequestError(unknown("data set", name, names, " or folder:PATH", hint))
    if workers:
        raise RequestError(
            f"--workers applies to folder:PATH only; {name} is loaded into memory; leave it out"
        )
    if name == "digits":
        return
    source = SOURCES[name]
    if source.is_unpacked(data_dir):
        for file in source.files:
            if file.endswith("-ubyte"):
                _check_idx(data_dir / source.folder / file)
        return
    if not download:
        raise RequestError(f"{name} is not under {data_dir}; give --data-dir")
    if all((data_dir / archive).is_file() for archive in source.archives):
        return
    if not _reachable(source.host):
        raise RequestError(
            f"{name} is not under {data_dir} and cannot be downloaded from here: give --data-dir a "
            f"directory that has {source.folder}, or use --dataset digits, which needs no download"
        )


def _check_idx(path: Path) -> None:
    """The header of an IDX file has its dimensions, which must agree with its length."""
    with path.open("rb") as file:
        head = file.read(4)
        dims = head[3] if len(head) == 4 and head[:2] == b"\0\0" else 0
        sizes = file.read(4 * dims)
    if not dims or len(sizes) != 4 * dims:
        raise RequestError(
            f"{path} is not an IDX file: delete it so that it can be downloaded again"
        )
    expected = 4 + 4 * dims + math.prod(struct.unpack(f">{dims}I", sizes))
    if path.stat().st_size != expected:
        raise RequestError(
            f"{path} is damaged: it has {path.stat().st_size} bytes instead of {expected}; "
            "delete it so that it can be downloaded again"
        )


def _reachable(host: str) -> bool:
    """Whether the host has an address. True behind a proxy, where only a download can show this."""
    import socket  # imported here to keep `pyro-sbp --help` fast
    import urllib.request

    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def folder_classes(root: Path) -> list[str]:
    """The classes of an image folder with ``train/<class>/*`` and ``test/<class>/*``.

    Raises:
        RequestError: a part is missing or empty, there is only one class, or the classes of the
            parts differ.
    """
    classes = {}
    for part in ("train", "test"):
        folder = root / part
        if not folder.is_dir():
            raise RequestError(f"{folder} is not a directory; an image folder has train/ and test/")
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if not names:
            raise RequestError(f"{folder} has no directory for a class, as in train/cat/1.png")
        for name in names:
            if not _has_image(folder / name):
                raise RequestError(
                    f"{folder / name} has no images; those end in {' '.join(IMAGE_SUFFIXES)}"
                )
        classes[part] = names
    if classes["train"] != classes["test"]:
        odd = sorted(set(classes["train"]) ^ set(classes["test"]))
        raise RequestError(
            f"{root} has different classes in train/ and test/: only one has {', '.join(odd)}"
        )
    if len(classes["train"]) == 1:
        (only,) = classes["train"]
        inner = sorted(e.name for e in os.scandir(root / "train" / only) if e.is_dir())
        deeper = (
            f"; the directories in it, such as {inner[0]}, belong one level up" if inner else ""
        )
        raise RequestError(
            f"{root / 'train'} has only one class, {only}; expected a directory for each of two or "
            f"more classes{deeper}"
        )
    return classes["train"]


def _has_image(folder: Path) -> bool:
    return any(
        name.lower().endswith(IMAGE_SUFFIXES) for _, _, names in os.walk(folder) for name in names
    )
