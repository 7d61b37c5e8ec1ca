"""The facts about the machine and the installation that a bug report needs."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyro_sbp.datasets.sources import SOURCES
from pyro_sbp.datasets.status import DatasetStatus, dataset_status
from pyro_sbp.errors import first_line
from pyro_sbp.machine import memory_info, processor_name
from pyro_sbp.training.packages import Extra, find_extras, find_versions
from pyro_sbp.training.threads import choose_threads, measure_cores

__all__ = ["CudaDevice", "Devices", "Environment", "Load", "Memory", "Threads", "read_environment"]

#: The variables that set how many threads the libraries of torch start, and how threads wait.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_THREAD_LIMIT",
    "OMP_DYNAMIC",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "MKL_DYNAMIC",
    "OPENBLAS_NUM_THREADS",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
)


@dataclass(frozen=True)
class CudaDevice:
    """A CUDA device as torch sees it; memory in bytes."""

    name: str
    memory: int
    free_memory: int
    capability: str


@dataclass(frozen=True)
class Devices:
    """The processor and the CUDA devices.

    Attributes:
        cpu: the name of the processor.
        cpus: how many CPUs the system has; two of them may share a core.
        cuda: the CUDA devices.
        cuda_version: the version of CUDA that torch was built for, or None.
        driver: the version of the NVIDIA driver, or None.
    """

    cpu: str
    cpus: int
    cuda: list[CudaDevice]
    cuda_version: str | None
    driver: str | None


@dataclass(frozen=True)
class Threads:
    """Numbers of CPU threads.

    Attributes:
        torch: torch's own number; None if torch cannot be imported.
        chosen: the number that `train` would use now.
        source: the origin of this number: the name of a variable, or "free cores".
        variables: `THREAD_VARIABLES` that are set.
    """

    torch: int | None
    chosen: int
    source: str
    variables: dict[str, str]


@dataclass(frozen=True)
class Load:
    """How busy the machine is.

    Attributes:
        averages: the load averages of 1, 5 and 15 minutes; empty where the system has none.
        usable_cores: the number of cores that this process may use; with a quota, it may be a
            fraction.
        busy_cores: the number of these cores that other processes use.
    """

    averages: list[float]
    usable_cores: float
    busy_cores: float


@dataclass(frozen=True)
class Memory:
    """Bytes of memory; None if the system does not report them.

    Attributes:
        total: the memory of the machine.
        available: the memory of the machine that is available for new data.
        usable: the available memory within the limit of the container.
    """

    total: int | None
    available: int | None
    usable: int | None


@dataclass(frozen=True)
class Environment:
    """What `pyro-sbp doctor` reports.

    Attributes:
        versions: of Python, pyro-sbp and the packages that it needs; None for a missing package.
        platform: the system, its release and the architecture.
        disk: free bytes on the disk of the current directory; None if they cannot be read.
        extras: the extras, by name.
        data_dir: the directory of the data sets.
        datasets: the status of the data sets, by name.
        problems: problems that keep pyro-sbp from working, one line each.
    """

    versions: dict[str, str | None]
    platform: str
    devices: Devices
    threads: Threads
    load: Load
    memory: Memory
    disk: int | None
    extras: dict[str, Extra]
    data_dir: str
    datasets: dict[str, DatasetStatus]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The home directory and the name of the user are replaced."""
        return _anonymous(asdict(self))


def read_environment(
    data_dir: Path = Path("data"), datasets: Sequence[str] = (*SOURCES, "digits")
) -> Environment:
    """Collect the facts about this machine and installation.

    Nothing is downloaded. Broken packages are reported and do not raise an error.

    Args:
        data_dir: the directory of the data sets.
        datasets: names as for `load_dataset`.

    Raises:
        RequestError: there is no data set with one of the names.
    """
    states = {name: dataset_status(name, data_dir) for name in datasets}
    # Measured before torch is imported, because the import keeps cores busy.
    choice = choose_threads()
    cores = choice.cores or measure_cores()
    versions, problems = find_versions()
    torch = _import_torch(problems)
    return Environment(
        versions,
        platform.platform(),
        _devices(torch, problems),
        Threads(
            None if torch is None else torch.get_num_threads(),
            choice.threads,
            choice.source,
            {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        ),
        Load(_load_averages(), round(cores.usable, 2), round(cores.busy, 2)),
        _memory(torch),
        _free_disk(),
        find_extras(),
        str(data_dir),
        states,
        problems,
    )


def _import_torch(problems: list[str]) -> Any:
    """The module torch; None if it cannot be imported, which adds a problem to the list."""
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything
        if not any(problem.startswith("torch: ") for problem in problems):
            kind = type(error).__name__
            problems.append(f"torch: cannot be imported: {kind}: {first_line(error)}")
        return None
    return torch


def _devices(torch: Any, problems: list[str]) -> Devices:
    cuda, version = [], None
    if torch is not None:
        version = torch.version.cuda
        try:
            cuda = [_cuda_device(torch, index) for index in range(torch.cuda.device_count())]
        except Exception as error:  # a broken driver may raise anything
            problems.append(f"CUDA: {first_line(error)}")
    return Devices(processor_name(), os.cpu_count() or 1, cuda, version, _driver())


def _cuda_device(torch: Any, index: int) -> CudaDevice:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return CudaDevice(properties.name, total, free, f"{properties.major}.{properties.minor}")


def _driver() -> str | None:
    """The version of the NVIDIA driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"[\d.]+", done.stdout)
    return None if found is None else found[0]


def _memory(torch: Any) -> Memory:
    info, usable = memory_info(), None
    if torch is not None:
        from pyro_sbp.datasets.memory import available_memory

        usable = available_memory(torch.device("cpu"))
    return Memory(info.get("MemTotal"), info.get("MemAvailable"), usable)


def _free_disk() -> int | None:
    try:
        return shutil.disk_usage(".").free
    except OSError:
        return None


def _load_averages() -> list[float]:
    try:
        return [round(average, 2) for average in os.getloadavg()]
    except (AttributeError, OSError):  # not every system has them
        return []


def _anonymous(value: Any) -> Any:
    """Replace the home directory by ~, and the name of the user in paths by USER."""
    if isinstance(value, dict):
        return {_anonymous(key): _anonymous(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_anonymous(inner) for inner in value]
    if not isinstance(value, str):
        return value
    with contextlib.suppress(RuntimeError):  # a user without a home
        home = Path.home()
        if len(home.parts) > 1:
            value = re.sub(rf"{re.escape(str(home))}(?![^/\\:])", "~", value)
    with contextlib.suppress(ImportError, KeyError, OSError):  # a user without a name
        user = re.escape(getpass.getuser())
        value = re.sub(rf"(?<=[/\\]){user}(?=[/\\]|$)", "USER", value)
    return value
