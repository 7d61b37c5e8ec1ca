"""Find the gates of a network with another version of the package."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from pyro_sbp.errors import RequestError, first_line
from pyro_sbp.experiments.survey.collections import Surveyed
from pyro_sbp.experiments.survey.measurement import in_float64

__all__ = ["find", "version_of"]


def find(surveyed: Surveyed, directory: str) -> dict[str, Any]:
    """Find the gates of a network with another version of the package.

    This replaces the modules of the package in this process. Do not use the process for anything
    else.

    Args:
        surveyed: the network.
        directory: the directory that contains the package.

    Returns:
        The numbers of gates and units, and the CPU seconds of `find_gates`. If it raises an error,
        ``failed`` is the reason.
    """
    net, x = in_float64(surveyed)
    for module in [name for name in sys.modules if name.partition(".")[0] == "pyro_sbp"]:
        del sys.modules[module]
    sys.path.insert(0, directory)
    package = import_module("pyro_sbp")
    try:
        if any(isinstance(module, nn.MultiheadAttention) for module in net.modules()):
            net = package.separate_attention(net)
        start = time.process_time()
        gates = package.find_gates(net, x, ignore=surveyed.ignore)
        seconds = time.process_time() - start
    except Exception as error:  # networks may raise anything
        return {"failed": f"{type(error).__name__}: {first_line(error)}"[:300]}
    units = sum(gate.size for gate in gates)
    return {"gates": len(gates), "units": units, "cpu_seconds": round(seconds, 2)}


def version_of(directory: str) -> str:
    """The commit of the git checkout in a directory.

    Raises:
        RequestError: the directory has no package, or is not a git checkout.
    """
    if not (Path(directory) / "pyro_sbp").is_dir():
        raise RequestError(f"there is no package pyro_sbp in {directory}")
    command = ["git", "-C", directory, "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise RequestError(f"{directory} is not a git checkout") from error
