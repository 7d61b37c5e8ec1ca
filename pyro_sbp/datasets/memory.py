"""How much memory there is for data."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

__all__ = ["available_memory"]

#: Where a container is told how much it may use, by version 2 and 1 of control groups.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_memory(device: torch.device) -> int | None:
    """Bytes that may be used: of the host, of its container, and of the device if it is a GPU.

    The least counts. Where the system does not tell what is available, all that the host has; None
    where it tells nothing.
    """
    found = []
    host = _host()
    if host is not None:
        found.append(host)
    for limit in map(Path, LIMITS):
        text = limit.read_text().strip() if limit.is_file() else "max"
        if text != "max":
            found.append(int(text))
    if device.type == "cuda":
        found.append(torch.cuda.mem_get_info(device)[0])
    return min(found, default=None)


def _host() -> int | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        line = re.search(r"^MemAvailable: +(\d+) kB", meminfo.read_text(), flags=re.M)
        if line is not None:
            return int(line[1]) * 1024
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
