"""Download the data sets of torchvision. An error names its cause and what to do."""

from __future__ import annotations

import errno
import lzma
import os
import re
import ssl
import tarfile
import zlib
from gzip import BadGzipFile
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from pyro_sbp.datasets.sources import SOURCES
from pyro_sbp.errors import RequestError, first_line

__all__ = ["download"]

_NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException, RuntimeError)
_ARCHIVE = (BadGzipFile, EOFError, lzma.LZMAError, tarfile.TarError, zlib.error)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def download(name: str, data_dir: Path) -> None:
    """Download and unpack a data set of torchvision, unless its files exist.

    Args:
        name: one of `SOURCES`.
        data_dir: the directory of torchvision's data sets.

    Raises:
        RequestError: the data set cannot be downloaded, written or unpacked.
    """
    from torchvision import datasets

    source = SOURCES[name]
    if source.is_unpacked(data_dir):
        return
    try:
        getattr(datasets, source.class_name)(data_dir, download=True)
    except (*_NETWORK, *_ARCHIVE, OSError) as error:
        if isinstance(error, RuntimeError) and source.is_unpacked(data_dir):
            return  # torchvision rejects the files; reading them raises an error with the cause
        raise RequestError(f"{name} {_failure(error, data_dir / source.folder)}") from error


def _failure(error: Exception, folder: Path) -> str:
    """A message that says what failed, why, and what to do."""
    cause = _cause(error)
    if isinstance(error, _ARCHIVE):
        return (
            f"cannot be unpacked in {folder} ({cause}): delete its archives, so that they are "
            "downloaded again"
        )
    if isinstance(error, _NETWORK) or not isinstance(error, OSError) or error.errno is None:
        return (
            f"is missing or incomplete in {folder}, and cannot be downloaded ({cause}): try again, "
            "give a --data-dir that has it, or use --dataset digits, which needs no download"
        )
    if error.errno in _FULL:
        return f"does not fit into {folder} ({cause}): free some space, or give another --data-dir"
    return f"cannot be written to {folder} ({cause}): give another --data-dir"


def _cause(error: Exception) -> str:
    """The cause in one line. torchvision lists one cause for each server that it tried."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{os.strerror(error.errno)}: {error.filename}"
    listed = re.findall(r"^Tried .*, got:\n(.+)$", str(error), flags=re.M)
    return listed[-1] if listed else first_line(error)
