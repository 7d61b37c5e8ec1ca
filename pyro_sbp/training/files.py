"""Files that appear whole or not at all, and directories that one process writes at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyro_sbp.errors import RequestError

__all__ = ["LOCK", "lock", "write_json", "write_text", "write_whole"]

#: The file that a process holds while it writes a directory; it stays behind, empty.
LOCK = ".lock"


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Inside, no other process gets the lock of the directory, which must exist.

    Raises:
        RequestError: another process has it.
    """
    from filelock import FileLock, Timeout  # not for the help of the command line

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
    """Write a file of another name, and give it its own once it is on the disk.

    Raises:
        OSError: it cannot be written; what was at `path` is left as it was.
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
    """Write a text file whole."""
    write_whole(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")
