"""Replace several files of a directory together, and verify them by their checksums.

One file, the index, contains the checksums of the others. All new files are first written under
temporary names. Renaming the new index to its final name commits the replacement: before it, the
old files are in use; after it, the new files are. Until a new file has been renamed too, `locate`
finds it under its temporary name by the checksum in the index.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

__all__ = ["complete", "locate", "part", "replace", "sync"]

#: The suffix of the temporary name of a file that is being written.
PART = ".part"
#: The errors of file systems that cannot synchronise the entries of a directory.
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)


def part(path: Path) -> Path:
    """The temporary name of a file or directory that is being written."""
    return path.with_name(path.name + PART)


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a directory, is on the disk.

    Raises:
        OSError: the file cannot be written.
    """
    directory = path.is_dir()
    if directory and os.name == "nt":
        return  # Windows cannot open a directory.
    descriptor = os.open(path, os.O_RDONLY if directory else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not directory or error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace(
    directory: Path,
    writers: Mapping[str, Callable[[Path], object]],
    index: str,
    describe: Callable[[Mapping[str, str]], str],
    others: Collection[str] = (),
) -> None:
    """Replace the files of a directory, which must exist.

    Args:
        directory: the directory. If an earlier call was interrupted, `complete` must be called
            first.
        writers: from the name of each new file to a function that writes it to a path.
        index: the name of the index.
        describe: a function from the checksums of the files to the new content of the index.
        others: files that are removed once the new files are in use.

    Raises:
        OSError: a file cannot be written. If the new index is not in use yet, the old files are
            unchanged, and the temporary files are removed.
    """
    parts = {name: part(directory / name) for name in (*writers, index)}
    committing = False
    try:
        checksums = {}
        for name, write in writers.items():
            write(parts[name])
            sync(parts[name])
            checksums[name] = checksum(parts[name])
        parts[index].write_text(describe(checksums), encoding="utf-8")
        sync(parts[index])
        sync(directory)
        committing = True
        os.replace(parts[index], directory / index)
        sync(directory)
        for name in writers:
            os.replace(parts[name], directory / name)
        for name in others:
            (directory / name).unlink(missing_ok=True)
            part(directory / name).unlink(missing_ok=True)
        sync(directory)
    finally:
        # After the commit, the temporary files may be the only copy of the new content. The files
        # show whether the commit has happened, because an interrupt can occur right after the
        # renaming.
        if not committing or parts[index].exists():
            for file in parts.values():
                file.unlink(missing_ok=True)


def locate(directory: Path, name: str, expected: str | None) -> Path | None:
    """Find a file of the index, under its final or its temporary name.

    Args:
        directory: the directory.
        name: the name of the file.
        expected: its checksum; None accepts a file of this name without a check.

    Returns:
        The path, or None if there is no such file.

    Raises:
        ValueError: the file has another checksum.
        OSError: the file cannot be read.
    """
    path = directory / name
    candidates = [file for file in (path, part(path)) if file.is_file()]
    if expected is None:
        return path if path in candidates else None
    for file in candidates:
        if checksum(file) == expected:
            return file
    if path in candidates:
        raise ValueError(f"{name} is damaged: it differs from its checksum")
    return None


def complete(directory: Path, checksums: Mapping[str, str]) -> None:
    """Complete an interrupted `replace`: rename its temporary files to their final names.

    Args:
        directory: the directory.
        checksums: the checksums in the index, by the name of the file.
    """
    for name, expected in checksums.items():
        path = directory / name
        if part(path).is_file() and checksum(part(path)) == expected:
            os.replace(part(path), path)
    sync(directory)
