"""Measure a network in a separate process, so that a crash or a hang ends only that process."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from pyro_sbp.errors import first_line
from pyro_sbp.experiments.survey.collections import collection

__all__ = ["Comparisons", "measured"]

#: How many times longer than its time limit a process may take where others use the processor.
_SLOWER = 10
#: Imported once with the libraries, before the processes are forked.
_PRELOADED = [f"{__package__}.__main__", f"{__package__}.measurement"]


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of a network.

    Attributes:
        torch_pruning: whether the network is also cut by Torch-Pruning.
        before: the directory of another version of the package, or None.
    """

    torch_pruning: bool = False
    before: str | None = None

    @property
    def keys(self) -> list[str]:
        """The keys of the results in the record of a network."""
        asked = {"torch_pruning": self.torch_pruning, "before": self.before is not None}
        return [key for key, wanted in asked.items() if wanted]


def measured(
    collected: str, name: str, limit: float, comparisons: Comparisons = Comparisons()
) -> dict[str, Any]:
    """Measure a network in a separate process.

    Args:
        collected: the collection.
        name: the name of the network.
        limit: the CPU seconds that each of the measurement and the comparisons may take.
        comparisons: the comparisons to make.

    Returns:
        The measurements. If nothing was measured, ``failed`` is the reason.
    """
    context = multiprocessing.get_context("forkserver")
    libraries = [library.replace("-", "_") for library in collection(collected).LIBRARIES]
    context.set_forkserver_preload([*_PRELOADED, *libraries])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, collected, name, limit, comparisons))
    process.start()
    sender.close()
    deadline = time.monotonic() + _SLOWER * limit
    parts: list[dict[str, Any]] = []
    finished = False
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            parts.append(receiver.recv())
    except EOFError:
        finished = True
    if not finished:
        process.kill()
    process.join()
    row: dict[str, Any] = {}
    for part in parts:
        row |= part
    if not row:
        return {"failed": _why(process.exitcode, limit, finished)}
    missing = [key for key in comparisons.keys if key not in row and "failed" not in row]
    if missing:
        row[missing[0]] = {"failed": _why(process.exitcode, limit, finished)}
    return row


def _why(status: int | None, limit: float, finished: bool) -> str:
    if not finished or status == -signal.SIGXCPU:
        return f"not finished after {limit:g} s"
    if status is not None and status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}"


def _measure(
    sender: Connection, collected: str, name: str, limit: float, comparisons: Comparisons
) -> None:
    """Send the measurements, then the results of the comparisons."""
    import torch

    from pyro_sbp.experiments.survey.measurement import Prepared, measure

    _limit(limit)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        surveyed = collection(collected).build(name)
        prepared = Prepared(surveyed)
        sender.send(measure(surveyed, prepared))
    except Exception as error:  # networks may raise anything
        sender.send({"failed": f"{type(error).__name__}: {first_line(error)}"[:300]})
        return
    if comparisons.torch_pruning:
        from pyro_sbp.experiments.survey.torch_pruning_cut import compare

        _limit(limit)
        sender.send({"torch_pruning": compare(prepared)})
    if comparisons.before is not None:
        from pyro_sbp.experiments.survey.other_version import find

        del surveyed, prepared  # large networks fit into memory only once
        _limit(limit)
        torch.manual_seed(0)
        sender.send({"before": find(collection(collected).build(name), comparisons.before)})


def _limit(seconds: float) -> None:
    """Make the system end this process, by SIGXCPU, after so many further seconds of CPU time."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, most))
