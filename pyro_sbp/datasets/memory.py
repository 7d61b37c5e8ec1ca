"""How much memory is left for data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["available_memory"]

#: Where Linux describes control groups, by which containers are limited, and those of a process.
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


class _Files(NamedTuple):
    """Where a version of control groups has its numbers on memory."""

    controller: str  # of a line of OWN_CGROUPS
    folder: str  # under CGROUPS
    limit: str
    used: str
    cache: str  # the line of memory.stat with the file cache that can be dropped


_VERSION_2 = _Files("", "", "memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Files(
    "memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
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
    own = _text(OWN_CGROUPS).splitlines()
    for files in (_VERSION_2, _VERSION_1):
        root = CGROUPS / files.folder
        groups = {root}
        for line in own:
            _, controllers, path = line.split(":", 2)
            if files.controller in controllers.split(","):
                # Inside a container its own group is the root, and this path does not exist.
                group = root / path.strip("/")
                groups |= {group, *(above for above in group.parents if above.is_relative_to(root))}
        for group in groups:
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
    cache = re.search(rf"^{files.cache} (\d+)$", _text(stat), flags=re.M)
    return max(0, limit - (used or 0) + (int(cache[1]) if cache else 0))


def _text(path: Path) -> str:
    """The content of a file; empty where the system has no such file or does not show it."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or "max" in it."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _host() -> int | None:
    line = re.search(r"^MemAvailable: +(\d+) kB", _text(Path("/proc/meminfo")), flags=re.M)
    if line is not None:
        return int(line[1]) * 1024
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
