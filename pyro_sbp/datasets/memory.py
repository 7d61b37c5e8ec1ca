"""Measure how much memory is available for data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from pyro_sbp.machine import control_groups, memory_info, read_text

__all__ = ["available_memory"]


class _Files(NamedTuple):
    """The names of the files in which a version of control groups stores the numbers for memory."""

    controller: str
    limit: str
    used: str
    cache: str  # the line of memory.stat with the file cache that can be dropped


_VERSION_2 = _Files("", "memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Files(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)


def available_memory(device: torch.device) -> int | None:
    """The number of bytes that data can take: the smallest of the available memory of the host, of
    every control group of the process, and of the device if it is a GPU.

    If the system does not report the available memory of the host, its total memory is used. The
    result is None if the system reports no number.
    """
    found = [*_left_in_groups()]
    host = _host()
    if host is not None:
        found.append(host)
    if device.type == "cuda":
        found.append(torch.cuda.mem_get_info(device)[0])
    return min(found, default=None)


def _left_in_groups() -> Iterator[int]:
    """The available bytes within the limit of each control group of this process. The groups are
    nested.
    """
    for files in (_VERSION_2, _VERSION_1):
        for group in control_groups(files.controller):
            left = _left_in(group, files)
            if left is not None:
                yield left


def _left_in(group: Path, files: _Files) -> int | None:
    """The available bytes within the limit of a control group; None if it has no limit."""
    limit, used = _number(group / files.limit), _number(group / files.used)
    if limit is None:
        return None
    stat = group / "memory.stat"
    # The kernel drops this part of the file cache before it runs out of memory.
    cache = re.search(rf"^{files.cache} (\d+)$", read_text(stat), flags=re.M)
    return max(0, limit - (used or 0) + (int(cache[1]) if cache else 0))


def _number(path: Path) -> int | None:
    """The number in a file; None if the file does not exist, or contains "max"."""
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def _host() -> int | None:
    if available := memory_info().get("MemAvailable"):
        return available
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
