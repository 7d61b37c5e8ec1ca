"""The memory, the processor and the control groups of this machine, without importing torch."""

from __future__ import annotations

import platform
import re
from pathlib import Path

__all__ = ["NOISY", "control_groups", "cpu_governor", "memory_info", "processor_name", "read_text"]

#: A latency whose spread is larger is unreliable, because the machine was busy.
NOISY = 0.3
#: The directory in which Linux describes processes, the memory and the processor.
PROC = Path("/proc")
#: The directory in which Linux describes control groups, which limit containers.
CGROUPS = Path("/sys/fs/cgroup")
#: The directory in which Linux describes the cores of the processor.
CORES = Path("/sys/devices/system/cpu")


def read_text(path: Path) -> str:
    """The content of a file, or an empty string if it does not exist or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def control_groups(controller: str = "") -> list[Path]:
    """The directories of the control groups that may limit this process.

    Inside a container, the path of a group may be its path outside the container. Then only the
    root directory exists.

    Args:
        controller: a controller of version 1, such as "cpu", or "" for version 2, which has a
            single hierarchy.
    """
    root = CGROUPS / controller
    found = {root}
    for line in read_text(PROC / "self" / "cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        if controller in controllers.split(","):
            group = root / place.strip("/")
            found |= {path for path in (group, *group.parents) if path.is_relative_to(root)}
    return sorted(found)


def memory_info() -> dict[str, int]:
    """From the names in ``/proc/meminfo`` to bytes. It is empty if there is no such file."""
    lines = re.findall(r"^(\w+): +(\d+) kB", read_text(PROC / "meminfo"), flags=re.M)
    return {name: int(size) * 1024 for name, size in lines}


def processor_name() -> str:
    """The model name of the processor."""
    line = re.search(r"^model name\s*:\s*(.+?)\s*$", read_text(PROC / "cpuinfo"), flags=re.M)
    return line[1] if line else platform.processor() or platform.machine()


def cpu_governor() -> str | None:
    """The policy by which Linux sets the clock frequency of the cores, such as "performance".

    Returns:
        The name; several names, separated by commas, if cores have different ones; None if it
        cannot be read, as in most virtual machines.
    """
    files = sorted(CORES.glob("cpu[0-9]*/cpufreq/scaling_governor"))
    names = dict.fromkeys(read_text(path).strip() for path in files)
    names.pop("", None)
    return ", ".join(names) or None
