"""Choose the number of CPU threads: one for each free core. Needs no torch.

The threads of an operation wait for each other. If one of them shares its core with another
process, it delays all of them. While other programs are running, a run with as many threads as
cores can be ten times slower than a run with one thread.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyro_sbp import machine
from pyro_sbp.machine import control_groups, read_text

__all__ = ["VARIABLES", "Cores", "ThreadChoice", "choose_threads", "measure_cores"]

#: The variables from which torch reads its number of threads, in order of precedence.
VARIABLES = ("MKL_NUM_THREADS", "OMP_NUM_THREADS")
#: A core counts as free if other processes use no more than this share of it.
SLACK = 0.2

CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Cores:
    """The physical cores that this process may use, and the number of them that other processes
    use.

    Attributes:
        usable: the number of cores given by CPU affinity and by the quota of the container. It may
            be a fraction.
        busy: the number of these cores that other processes use.
    """

    usable: float
    busy: float

    @property
    def free(self) -> float:
        """The number of cores that are free for this process."""
        return self.usable - self.busy


@dataclass(frozen=True)
class ThreadChoice:
    """The number of CPU threads of a process.

    Attributes:
        threads: the number.
        source: the origin of the number: "--threads", the name of a variable, "the run", or "free
            cores".
        processes: the number of processes of the run that share the cores.
        cores: the measured cores; None if the number was given.
    """

    threads: int
    source: str
    processes: int = 1
    cores: Cores | None = None

    @property
    def warning(self) -> str | None:
        """A warning in one line if the machine is busy, else None."""
        if self.cores is None:
            return None
        idle = self.processes * _whole(self.cores.usable / self.processes)
        if self.cores.free + SLACK >= min(idle, self.cores.usable):
            return None
        used, usable = (f"{n:.1f}".removesuffix(".0") for n in (self.cores.busy, self.cores.usable))
        number = f"{self.threads} thread{'s' * (self.threads != 1)}"
        if self.processes > 1:
            number += f" in each of {self.processes} processes"
        return (
            f"the machine is busy: other processes use {used} of {usable} cores; computing with "
            f"{number} (OMP_NUM_THREADS sets another number)"
        )


def choose_threads(
    threads: int | None = None, processes: int = 1, recorded: int | None = None
) -> ThreadChoice:
    """Choose the number of CPU threads for each process of a run.

    The first of these that is available is used: the given number, the number in `VARIABLES`, the
    number with which a resumed run was started, and the number of free cores, at least one. The
    numbers of variables and of a resumed run are limited to the number of usable CPUs.

    Args:
        threads: the number that the user gave.
        processes: the number of processes of the run on this machine.
        recorded: the number of threads with which a resumed run was started.
    """
    if threads is not None:
        return ThreadChoice(threads, "--threads", processes)
    for name in VARIABLES:
        # OpenMP accepts a list, with one number for each level of nested regions.
        number = re.match(r"\s*0*([1-9]\d*)\s*(,|$)", os.environ.get(name, ""))
        if number is not None:
            given = min(int(number[1]), len(_usable_cpus()))
            return ThreadChoice(given, name, processes)
    cores = measure_cores()
    if recorded is not None:
        return ThreadChoice(min(recorded, len(_usable_cpus())), "the run", processes, cores)
    return ThreadChoice(_whole(cores.free / processes), "free cores", processes, cores)


def measure_cores(seconds: float = 0.25) -> Cores:
    """Measure how many of the usable cores other processes keep busy.

    If the system does not report the time of each CPU, the load average of the last minute is used.

    Args:
        seconds: the duration of the measurement.
    """
    cores = _cores(_usable_cpus())
    groups = list(_limited_groups())
    before, start = (_cpu_times(), [group.used() for group in groups]), time.monotonic()
    own = time.process_time()
    time.sleep(seconds)
    after, end = (_cpu_times(), [group.used() for group in groups]), time.monotonic()
    own = (time.process_time() - own) / (end - start)

    shares = {cpu: _busy_share(times, after[0].get(cpu)) for cpu, times in before[0].items()}
    known = {cpu: share for cpu, share in shares.items() if share is not None}
    if known.keys() & set().union(*cores):
        busy = sum(min(1.0, sum(known.get(cpu, 0.0) for cpu in core)) for core in cores)
    else:
        busy = _load_average()
    usable = float(len(cores))
    free = usable - min(max(0.0, busy - own), usable)
    for group, first, last in zip(groups, before[1], after[1], strict=True):
        used = max(0.0, (last - first) / (end - start) - own)
        usable = min(usable, group.cores)
        free = min(free, max(0.0, group.cores - used))
    return Cores(usable, usable - free)


def _whole(cores: float) -> int:
    return max(1, math.floor(cores + SLACK))


def _usable_cpus() -> set[int]:
    """The CPUs on which this process may run. Two of them may share a core."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _cores(cpus: set[int]) -> list[set[int]]:
    """The CPUs of each physical core, including CPUs that this process may not use."""
    cores: dict[frozenset[int], None] = {}
    for cpu in sorted(cpus):
        path = CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        cores[frozenset(_cpu_list(read_text(path)) | {cpu})] = None
    return [set(core) for core in cores]


def _cpu_list(text: str) -> set[int]:
    """The numbers of a list such as ``0,4-6``."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _cpu_times() -> dict[int, tuple[int, int]]:
    """Clock ticks since the start of the system, by CPU: idle ticks and all ticks."""
    lines = re.findall(r"^cpu(\d+) (.+)$", read_text(machine.PROC / "stat"), flags=re.M)
    times = {}
    for cpu, text in lines:
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are part of user.
        ticks = [int(number) for number in text.split()[:8]]
        times[int(cpu)] = (sum(ticks[3:5]), sum(ticks))
    return times


def _busy_share(before: tuple[int, int], after: tuple[int, int] | None) -> float | None:
    """The share of the time in which a CPU was busy; None if no time was counted."""
    if after is None or after[1] <= before[1]:
        return None
    return 1 - (after[0] - before[0]) / (after[1] - before[1])


def _load_average() -> float:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # not every system has one
        return 0.0


@dataclass(frozen=True)
class _LimitedGroup:
    """A control group with a quota.

    Attributes:
        cores: the number of cores that its processes may use together.
        usage: the file with the CPU time that they have used.
        unit: one unit of that file, in seconds.
    """

    cores: float
    usage: Path
    unit: float

    def used(self) -> float:
        """Seconds of CPU time; 0 if they are not counted."""
        number = re.match(r"(?:usage_usec )?(\d+)", read_text(self.usage))
        return 0.0 if number is None else int(number[1]) * self.unit


def _limited_groups() -> Iterator[_LimitedGroup]:
    """The control groups, of version 2 or 1, that limit the CPU time of this process."""
    for directory in control_groups():
        cores = _quota(directory / "cpu.max")
        if cores is not None:
            yield _LimitedGroup(cores, directory / "cpu.stat", 1e-6)
    for directory in control_groups("cpu"):
        cores = _old_quota(directory)
        if cores is not None:
            accounts = machine.CGROUPS / "cpuacct" / directory.relative_to(machine.CGROUPS / "cpu")
            yield _LimitedGroup(cores, accounts / "cpuacct.usage", 1e-9)


def _quota(path: Path) -> float | None:
    found = re.match(r"(\d+) (\d+)", read_text(path))
    return int(found[1]) / int(found[2]) if found is not None else None


def _old_quota(directory: Path) -> float | None:
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        period = int((directory / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
