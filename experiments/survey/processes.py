"""Measure a network in a process of its own, so that a crash or a hang ends only that."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

from pyro_sbp.errors import first_line
from pyro_sbp.experiments.survey.collections import collection

__all__ = ["measured"]

#: How many times longer than its time limit a process may take where others use the processor.
_SLOWER = 10
#: CPU seconds that Torch-Pruning may take.
_LIMIT_OF_OTHERS = 10.0
#: Imported once with the libraries, before the processes are forked.
_PRELOADED = [f"{__package__}.__main__", f"{__package__}.measurement"]


def measured(collected: str, name: str, against: str | None, limit: float) -> dict[str, Any]:
    """Measure a network in a process of its own.

    Args:
        collected: the collection.
        name: of the network.
        against: "torch-pruning", to cut it with that as well.
        limit: seconds of the processor that the process may take.

    Returns:
        What was measured; ``failed`` is the reason if nothing was.
    """
    context = multiprocessing.get_context("forkserver")
    libraries = [library.replace("-", "_") for library in collection(collected).LIBRARIES]
    context.set_forkserver_preload([*_PRELOADED, *libraries])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, collected, name, against, limit))
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
    wanted = 1 if against is None or "failed" in row else 2
    if len(parts) >= wanted:
        return row
    if row:
        failed = {"failed": _why(process.exitcode, _LIMIT_OF_OTHERS, finished)}
        return {**row, "torch_pruning": failed}
    return {"failed": _why(process.exitcode, limit, finished)}


def _why(status: int | None, limit: float, finished: bool) -> str:
    if not finished or status == -signal.SIGXCPU:
        return f"not finished after {limit:g} s"
    if status is not None and status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}"


def _measure(
    sender: Connection, collected: str, name: str, against: str | None, limit: float
) -> None:
    """Send what is measured, and what Torch-Pruning does."""
    import torch

    from pyro_sbp.experiments.survey.measurement import Prepared, measure

    _limit(limit)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prepared, row = None, {}
    try:
        surveyed = collection(collected).build(name)
        prepared = Prepared(surveyed)
        row = measure(surveyed, prepared)
    except Exception as error:  # networks may raise anything
        row = {"failed": f"{type(error).__name__}: {first_line(error)}"[:300]}
    sender.send(row)
    if against and prepared is not None and "failed" not in row:
        from pyro_sbp.experiments.survey.torch_pruning_cut import compare

        _limit(_LIMIT_OF_OTHERS)
        sender.send({"torch_pruning": compare(prepared)})


def _limit(seconds: float) -> None:
    """Let the system end this process, with SIGXCPU, when it has taken so much more CPU time."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, most))
