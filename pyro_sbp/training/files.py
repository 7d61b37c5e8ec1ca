"""Atomic writes of files, and a lock for directories that one process writes at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyro_sbp.errors import RequestError

__all__ = ["LOCK", "lock", "write_json", "write_text", "write_whole"]

#: The file that a process locks while it writes a directory. It is empty and is not deleted.
LOCK = ".lock"


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, which must exist.

    Raises:
        RequestError: another process holds the lock.
    """
    from filelock import FileLock, Timeout  # imported here to keep `pyro-sbp --help` fast

    held = FileLock(directory / LOCK, timeout=0)
    try:
        held.acquire()
    except Timeout as error:
        raise RequestError(f"another process is writing {directory}") from error
    try:
        yield
    finally:
        held.release()


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: under a temporary name, which is changed when the data is on disk.

    Raises:
        OSError: the file cannot be written; an existing file at `path` is not changed.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_whole(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as a JSON file, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")
