"""Find which data sets are on disk. Needs no torch and downloads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pyro_sbp.datasets.sources import SOURCES, check_dataset, folder_classes
from pyro_sbp.errors import RequestError

__all__ = ["DatasetStatus", "dataset_status"]


@dataclass(frozen=True)
class DatasetStatus:
    """Whether a data set can be used.

    Attributes:
        state: "present", "missing" or "damaged".
        detail: an explanation, with paths relative to the data directory; or None.
    """

    state: str
    detail: str | None = None


def dataset_status(name: str, data_dir: Path) -> DatasetStatus:
    """Check whether a data set is complete, by the names and sizes of its files.

    Args:
        name: as for `load_dataset`; "folder:PATH" is an image folder.
        data_dir: the directory of torchvision's data sets.

    Raises:
        RequestError: there is no data set of that name.
    """
    try:
        if name.startswith("folder:"):
            return _folder(Path(name.removeprefix("folder:")))
        if name in SOURCES:
            return _files(name, data_dir)
    except (OSError, RequestError) as error:
        return DatasetStatus("damaged", _shortened(str(error), name, data_dir))
    check_dataset(name, data_dir, download=False)
    if find_spec("sklearn") is None:
        return DatasetStatus("missing", "scikit-learn, which contains it, is not installed")
    return DatasetStatus("present", "part of scikit-learn")


def _folder(root: Path) -> DatasetStatus:
    if not root.is_dir():
        return DatasetStatus("missing", "there is no such directory")
    return DatasetStatus("present", f"{len(folder_classes(root))} classes")


def _files(name: str, data_dir: Path) -> DatasetStatus:
    source = SOURCES[name]
    files = [(data_dir / source.folder / file).is_file() for file in source.files]
    archives = [(data_dir / archive).is_file() for archive in source.archives]
    if all(files):
        check_dataset(name, data_dir, download=False)
        return DatasetStatus("present")
    if all(archives):
        return DatasetStatus("present", "not unpacked yet")
    if any(files):
        return DatasetStatus("damaged", f"{sum(files)} of {len(files)} files")
    if any(archives):
        return DatasetStatus("damaged", f"{sum(archives)} of {len(archives)} archives")
    return DatasetStatus("missing")


def _shortened(text: str, name: str, data_dir: Path) -> str:
    root = Path(name.removeprefix("folder:")) if name.startswith("folder:") else data_dir
    return text.replace(f"{root}/", "").replace(f"{root}\\", "").replace(str(root), "the folder")
