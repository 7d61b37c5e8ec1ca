"""How much memory is left for data."""

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
    """Where a version of control groups has its numbers on memory."""

    controller: str
    limit: str
    used: str
    cache: str  # the line of memory.stat with the file cache that can be dropped


_VERSION_2 = _Files("", "memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Files(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)


def available_memory(device: torch.device) -> int | None:
    """Bytes that are left on the host, in each of its control groups, and on the device if a GPU.

    The smallest of them counts. Where the system does not say how much is available, it is all
    memory of the host; None where the system says nothing.
    """
    found = [*_left_in_groups()]
    host = _host()
    if host is not None:
        found.append(host)
    if device.type == "cuda":
        found.append(torch.cuda.mem_get_info(device)[0])
    return min(found, default=None)


def _left_in_groups() -> Iterator[int]:
    """What is left of every limit on this process: one group is inside another."""
    for files in (_VERSION_2, _VERSION_1):
        for group in control_groups(files.controller):
            left = _left_in(group, files)
            if left is not None:
                yield left


def _left_in(group: Path, files: _Files) -> int | None:
    """What is left of the limit of a group; None where it has none."""
    limit, used = _number(group / files.limit), _number(group / files.used)
    if limit is None:
        return None
    stat = group / "memory.stat"
    # The kernel drops this part of the file cache before it runs out of memory.
    cache = re.search(rf"^{files.cache} (\d+)$", read_text(stat), flags=re.M)
    return max(0, limit - (used or 0) + (int(cache[1]) if cache else 0))


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or "max" in it."""
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def _host() -> int | None:
    if available := memory_info().get("MemAvailable"):
        return available
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
